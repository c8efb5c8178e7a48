"""Optimizers made of the ops here; importing this package imports no torch."""
