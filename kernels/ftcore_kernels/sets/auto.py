"""Triton where there is a GPU, plain PyTorch elsewhere: the default."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import Kernel, KernelsConfig, Plan, Requirement, hookimpl
from ftcore_kernels.optim.choice import optimizer
from ftcore_kernels.sets._ops import GPU, kernels

if TYPE_CHECKING:
    import torch


@dataclass
class Config(KernelsConfig):
    """The automatic set has no settings of its own."""


@hookimpl
def ftcore_kernels() -> Sequence[Kernel]:
    """Both implementations; what they need of the device keeps all but one of them away, so none is asked for here."""
    if importlib.util.find_spec("triton") is None:
        return kernels("reference", Requirement())
    return [*kernels("triton", GPU), *kernels("reference", Requirement(device="cpu"))]


@hookimpl
def ftcore_make_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """ftcore's own AdamW in bitsandbytes' 8-bit format, for `trainer.optimizer=adamw_8bit` on a GPU with Triton."""
    return optimizer(plan, model)
