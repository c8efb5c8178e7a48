"""Rewards: how completions are judged."""
