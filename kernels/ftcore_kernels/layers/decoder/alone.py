"""Whether the gradient that autograd hands to a backward may be written over.

It may where nobody else holds it: no hook, no retained gradient, no other function of the graph, no view. How many
references there are to such a one differs between versions of Python and PyTorch, so it is looked up once, in a
backward like those that ask. Whoever holds one more is one too many.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Counts = tuple[int, ...]


def alone(dout: torch.Tensor) -> bool:
    """Whether only the backward that calls this holds `dout`: to be asked with its own argument, before any view."""
    if not hasattr(dout, "_use_count"):
        return False
    # Not through a function of its own: its argument would count.
    counts = (dout._use_count(), sys.getrefcount(dout), torch._C._storage_Use_Count(dout.untyped_storage()._cdata))
    if not _Probe.counts:
        with torch.enable_grad():
            x = torch.zeros(1, requires_grad=True)
            _Probe.apply(_Probe.apply(x)).backward(torch.zeros(1))
    return bool(_Probe.counts) and all(one <= most for one, most in zip(counts, _Probe.counts, strict=True))


class _Probe(torch.autograd.Function):
    """Its second backward is given what the first one returned, and nobody else has."""

    counts: Counts = ()

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> torch.Tensor:
        _count(dout)
        return dout + 1


def _count(dout: torch.Tensor) -> None:
    """Called as :func:`alone` is, so that the argument counts alike."""
    _Probe.counts = (
        dout._use_count(), sys.getrefcount(dout), torch._C._storage_Use_Count(dout.untyped_storage()._cdata)
    )  # fmt: skip
