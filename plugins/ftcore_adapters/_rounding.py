"""Steps that are too small for the weights that they are to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftcore import Plan
from ftcore.report import note
from ftcore_kernels.optim.choice import serves

if TYPE_CHECKING:
    from torch import nn

LOOKED_AT = 4096
"""Weights of each matrix."""


def say_lost(plan: Plan, model: nn.Module) -> None:
    """Say so where most weights of bfloat16 that are trained would stay what they are after a step of AdamW's.

    Such a step is about as large as the rate, and a weight has 8 bits: what is less than half of its last one is gone.
    """
    import torch

    trainer = plan.run.trainer
    matrices = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16 and p.dim() > 1]
    if trainer is None or not matrices or matrices[0].is_meta or _rounds_by_chance(plan):
        return
    rate = trainer.learning_rate
    if getattr(plan.run.adapter, "modules_to_save", ()):
        rate = trainer.embedding_learning_rate or rate
    some = torch.cat([p.detach().flatten()[:LOOKED_AT].cpu() for p in matrices])
    taken = float((some + rate != some).float().mean())
    if rate > 0 and taken < 0.5:
        note(
            f"weights are trained in bfloat16, and of those {taken:.0%} are changed by a step at a rate of {rate:g}: "
            "the others round back to what they were. On a GPU trainer.optimizer=adamw_8bit loses none on average, "
            "model.dtype=float32 takes every step anywhere, or use a higher rate"
        )


def _rounds_by_chance(plan: Plan) -> bool:
    """Whether the optimizer is the one of ftcore's kernels, which loses no step on average."""
    return serves(plan) and not {"auto", "triton"}.isdisjoint(plan.run.kernels)
