"""TRL's ORPOTrainer without the logits of whole rows."""

from __future__ import annotations

from trl.experimental.orpo import ORPOTrainer

from ftcore_trainers._concatenated_trainer import ConcatenatedTrainer


class FusedORPOTrainer(ConcatenatedTrainer, ORPOTrainer):
    """The loss is TRL's."""

    nll_of_prompt = True
