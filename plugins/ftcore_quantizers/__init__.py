"""Quantizers: how frozen weights are compressed."""
