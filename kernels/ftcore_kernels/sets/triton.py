"""Triton kernels: RMSNorm, RoPE and SwiGLU, forward and backward (compute capability 7.0 and up)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftcore import Kernel, KernelsConfig, Plan, Problem, hookimpl
from ftcore_kernels.sets._ops import TRITON, kernels


@dataclass
class Config(KernelsConfig):
    """The Triton set has no settings of its own."""


@hookimpl
def ftcore_kernels() -> Sequence[Kernel]:
    """Every op that exists in Triton."""
    return kernels("triton", TRITON)


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
