"""TRL's CPOTrainer, which has SimPO, without the logits of whole rows."""

from __future__ import annotations

import torch
from trl.experimental.cpo import CPOTrainer

from ftcore_trainers._concatenated_trainer import ConcatenatedTrainer


class FusedSimPOTrainer(ConcatenatedTrainer, CPOTrainer):
    """The losses are TRL's."""

    def average(self) -> bool:
        """SimPO's reward and IPO's are means over tokens."""
        return self.loss_type in ("ipo", "simpo")

    def _nll(self, model: object, logps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super()._nll(model, logps, labels) if self.cpo_alpha else logps.new_zeros(())
