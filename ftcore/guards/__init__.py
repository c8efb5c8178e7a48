"""What keeps a training run whole: steps that are not finite, batches that do not fit, steps that never end."""
