"""transformers' Trainer for losses that are means over rows."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from ftcore_trainers._lean_loop import LeanLoop


class MeanTrainer(LeanLoop, Trainer):
    """The loss of a step is the mean over its micro-batches.

    A model that takes any keyword is taken for one that divides by the number of items in the whole step, which those
    with heads for rows do not: accumulated gradients would be too large by the number of micro-batches.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False
