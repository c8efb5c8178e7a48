"""Generators: who writes completions for reinforcement learning."""
