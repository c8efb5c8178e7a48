"""Parts of `train_step.py`: one row of work, measured on each side in a process of its own."""
