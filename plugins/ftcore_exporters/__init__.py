"""Exporters: the trained model for each consumer."""
