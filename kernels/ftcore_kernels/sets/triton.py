"""Triton kernels: decoder layers, head and loss, experts, norms, RoPE and SwiGLU (compute capability 7.0 and up)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import Kernel, KernelsConfig, Plan, Problem, hookimpl
from ftcore_kernels.optim.choice import optimizer
from ftcore_kernels.sets._ops import TRITON, kernels

if TYPE_CHECKING:
    import torch


@dataclass
class Config(KernelsConfig):
    """The Triton set has no settings of its own."""


@hookimpl
def ftcore_kernels() -> Sequence[Kernel]:
    """Every op that exists in Triton."""
    return kernels("triton", TRITON)


@hookimpl
def ftcore_make_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """ftcore's own AdamW in bitsandbytes' 8-bit format, for `trainer.optimizer=adamw_8bit` on a GPU."""
    return optimizer(plan, model)


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Asked for by name, Triton must be able to run."""
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return [Problem("kernels", "the package triton is not installed", "use kernels=[auto]")]
    if not plan.device.runs_triton:
        return [
            Problem("kernels", "kernels=[triton] needs a GPU", "use kernels=[auto], which takes plain PyTorch on a CPU")
        ]
    return []
