"""TRL's KTOTrainer with the model's own fused head, and a baseline that does not depend on the micro-batch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from trl import KTOTrainer
from trl.data_utils import extract_prompt, unpair_preference_dataset

from ftcore_trainers._preference_trainer import ReferredTrainer


class FusedKTOTrainer(ReferredTrainer, KTOTrainer):
    """The losses are TRL's.

    KTO's baseline is the mean KL divergence on mismatched prompts and answers. TRL pairs and averages them within the
    micro-batch; here they are those of the optimizer step, which is the same where a step is one micro-batch.
    """

    _kl_of_step: torch.Tensor | None = None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        columns = next(iter(dataset))
        if "prompt" not in columns:
            dataset = dataset.map(extract_prompt)
        shuffled = dataset_name == "train" and isinstance(dataset, Dataset)
        if "rejected" in columns:
            # TRL puts all wanted answers of a block before the others: a batch of rows that keep their order has both.
            pairs = 1000 if shuffled else max(args.per_device_train_batch_size // 2, 2)
            dataset = unpair_preference_dataset(dataset, batch_size=pairs)
        # Mismatched pairs belong to their neighbours, so TRL reads the rows in their order: it is drawn here, once.
        if shuffled:
            dataset = dataset.shuffle(seed=args.data_seed)
        whole = copy.copy(args)
        whole.per_device_train_batch_size *= args.gradient_accumulation_steps
        return super()._prepare_dataset(dataset, processing_class, whole, dataset_name)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, whose baseline is computed first."""
        batches, number = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._kl_of_step = self._kl(batches) if self.calculate_KL and len(batches) > 1 else None
        return batches, number

    def before_parts(self, parts: list[Any]) -> None:
        """The baseline is that of the step also where a micro-batch is cut."""
        if self.calculate_KL and self._kl_of_step is None:
            self._kl_of_step = self._kl(parts)

    def _kl(self, batches: list[Any]) -> torch.Tensor:
        """Mean over all rows of the log-ratios of mismatched pairs, a scalar."""
        self._kl_of_step = None
        policy, reference = self._callable(self.model), self.ref_model
        ratios = []
        for batch in map(self._prepare_inputs, batches):
            ours = self._compute_kl_logps(policy, batch)
            theirs = batch["ref_KL_logps"] if self.precompute_ref_logps else self._compute_kl_logps(reference, batch)
            ratios.append(ours - theirs)
        return torch.cat(ratios).mean()

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Any:
        """Log-probabilities of mismatched answers `[B]`; TRL takes the mean of the policy's less the reference's."""
        if self._kl_of_step is None or not self.model.training:
            return super()._compute_kl_logps(model, batch)
        theirs = batch["ref_KL_logps"] if self.precompute_ref_logps else batch["label"].new_zeros((), dtype=torch.float)
        return theirs if model is self.ref_model else theirs + self._kl_of_step
