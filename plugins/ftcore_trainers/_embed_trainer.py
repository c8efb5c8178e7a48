"""transformers' Trainer on pairs of embeddings."""

from __future__ import annotations

from typing import Any

import torch

from ftcore_trainers._mean_trainer import MeanTrainer
from ftcore_trainers._measures import recall_at_1, spearman
from ftcore_trainers._pairs import FIRST, NEGATIVE, SECOND, cosine_loss, one_left, ranking_loss
from ftcore_trainers._pooling import embeddings


class EmbedTrainer(MeanTrainer):
    """Ranking where the rows are pairs, the cosine where they have scores."""

    def __init__(self, scale: float, **kwargs: Any) -> None:
        super().__init__(compute_metrics=measure, **kwargs)
        self.scale = scale

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch of `Pairs`; with outputs, both embeddings."""
        first, second = embeddings(model, inputs[FIRST]), embeddings(model, inputs[SECOND])
        if "same" not in inputs:
            loss = cosine_loss(first, second, inputs["labels"])
        else:
            negatives = embeddings(model, inputs[NEGATIVE]) if NEGATIVE in inputs else None
            loss = ranking_loss(first, second, negatives, inputs["same"], self.scale)
        return (loss, (first, second)) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """As the trainer's own, but a pair that an epoch leaves alone is left out of it: its loss would be 0."""
        asked = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = asked or one_left(self.train_dataset, self.args.per_device_train_batch_size)
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = asked  # which held-out rows go by as well

    def whole(self, inputs: Any) -> str:
        """Ranking compares every row with all others of the micro-batch."""
        return "a row's negatives are the other rows" if "same" in inputs else ""

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The loss, both embeddings `[rows, size]`, and the labels `[rows]`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return loss.detach(), None if prediction_loss_only else outputs, inputs["labels"]


def measure(output: Any) -> dict[str, float]:
    """Spearman's correlation of cosines with scores, or recall at 1 among all held-out rows."""
    first, second = output.predictions
    if output.label_ids.dtype.kind == "f":
        return {"spearman": spearman((first * second).sum(axis=1), output.label_ids)}
    return {"recall_at_1": recall_at_1(first, second)}
