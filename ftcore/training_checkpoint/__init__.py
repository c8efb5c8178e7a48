"""Checkpoints of a run that is being trained: whole or not there, checked by hash, without pickle."""
