"""Whether ftcore's own optimizer serves a plan; imports no torch until it does."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ftcore import Plan
from ftcore.config import Optimizer
from ftcore.parameter_groups import parameter_groups

if TYPE_CHECKING:
    import torch


def optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """`AdamW8bit` for `trainer.optimizer=adamw_8bit` on a GPU with Triton; None leaves it to the trainer.

    It has the groups of `ftcore.parameter_groups`: no weight decay for norms and biases, and rates of their own.
    Weights of bfloat16 are rounded by chance, from the run's seed, so that steps at low rates are not lost.
    """
    trainer = plan.run.trainer
    if trainer is None or not serves(plan):
        return None
    from ftcore_kernels.optim.adamw_8bit import AdamW8bit

    betas = (float(trainer.args.get("adam_beta1", 0.9)), float(trainer.args.get("adam_beta2", 0.999)))
    return AdamW8bit(
        parameter_groups(trainer, model),
        lr=trainer.learning_rate,
        betas=betas,
        eps=float(trainer.args.get("adam_epsilon", 1e-8)),
        rounding=trainer.seed,
    )


def serves(plan: Plan) -> bool:
    """Whether a run that has a kernel set with this optimizer gets it."""
    trainer = plan.run.trainer
    if trainer is None or trainer.optimizer is not Optimizer.adamw_8bit:
        return False
    if plan.device.kind != "cuda" or plan.device.capability < (7, 0) or importlib.util.find_spec("triton") is None:
        return False
    # What only bitsandbytes knows.
    return not any(trainer.args.get(name) for name in ("optim_args", "optim_target_modules"))
