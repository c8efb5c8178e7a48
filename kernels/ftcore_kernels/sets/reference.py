"""The same ops in plain PyTorch: the oracle of the Triton kernels, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftcore import Kernel, KernelsConfig, Requirement, hookimpl
from ftcore_kernels.sets._ops import kernels


@dataclass
class Config(KernelsConfig):
    """The reference set has no settings of its own."""


@hookimpl
def ftcore_kernels() -> Sequence[Kernel]:
    """Every op; plain PyTorch runs anywhere."""
    return kernels("reference", Requirement())
