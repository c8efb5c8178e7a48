"""TRL's DPOTrainer with the model's own fused head, and the policy's own weights as its reference."""

from __future__ import annotations

from trl import DPOTrainer

from ftcore_trainers._preference_trainer import ReferredTrainer


class FusedDPOTrainer(ReferredTrainer, DPOTrainer):
    """The losses are TRL's."""
