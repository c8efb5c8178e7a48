"""Trainers: training methods, each a plugin."""
