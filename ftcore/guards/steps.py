"""What the guards know of the optimizer step that is being made: its micro-batches and their rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ftcore.guards.rows import Rows
from ftcore.training_checkpoint.trainer import SafeCheckpoints


class WatchedSteps(SafeCheckpoints):
    """A base that keeps the batches of a step until the next one, and sees every pass."""

    model_wrapped: Any
    current_gradient_accumulation_steps: int
    guarded = True
    """Whether the guards look at all; off, the loop is transformers' own, for measuring."""

    _drawn_rows: Rows | None = None
    _step_batches: list[Any]
    _step_rows: list[list[int]] | None = None
    _step_items: Any = None

    def get_train_dataloader(self) -> Any:
        """The trainer's own, whose draws are remembered."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        accelerator = self.accelerator
        self._drawn_rows = Rows(loader, accelerator.process_index, accelerator.num_processes) if self.guarded else None
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self._begin_step(batches, items)
        return batches, items

    def _begin_step(self, batches: list[Any], items: Any) -> None:
        """Note the micro-batches, and how many tokens, or what a loss is divided by, they have."""
        self._step_batches, self._step_items = batches, items
        self._step_rows = None
        if self._drawn_rows is not None and batches:
            accumulation = self.args.gradient_accumulation_steps
            self._step_rows = self._drawn_rows.take(len(batches), self.state.global_step, accumulation)

    def _one_pass(self, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch by the trainer below; returns its loss."""
        loss: torch.Tensor = super().training_step(model, inputs, items)  # type: ignore[misc]
        return loss


def copied(inputs: Any) -> Any:
    """Trainers take things out of their batches; what is done again needs them whole."""
    if isinstance(inputs, Mapping):
        return type(inputs)(inputs) if isinstance(inputs, dict) else dict(inputs)
    return list(inputs) if isinstance(inputs, list) else inputs
