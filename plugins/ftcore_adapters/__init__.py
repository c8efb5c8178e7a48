"""Adapters: what of the model is trained."""
