"""Parts of the benches of trainers that learn from preferences or rewards."""
