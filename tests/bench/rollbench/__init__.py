"""How fast completions are written."""
