"""Data formats: how raw rows look, how they are checked, and what they become."""
