"""A product with another matrix for each group of rows, and its gradients.

On GPUs of sm_90 and sm_10x, bf16 goes through PyTorch's grouped GEMM, one launch for all groups; everything else group
by group, which costs a look at the groups' sizes from the host. (On other GPUs PyTorch's own does that too, with a
launch for empty groups as well.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

AT_ONCE = (9, 10)
"""Major compute capabilities for which PyTorch has one kernel for all groups."""
ALIGNED = 16
"""Bytes to which the grouped GEMM wants every row."""


def grouped(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`x w_e^T` for the rows of each group e; differentiable, and w has no gradient computed that nobody wants.

    :param x: `[S, K]`, the groups' rows one under the other.
    :param w: `[E, N, K]` in the dtype of `x`.
    :param ends: `[E]` int32: where each group's rows end.
    :returns: `[S, N]`.
    """
    out: torch.Tensor = _Grouped.apply(x, w, ends)
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w, ends)
        return by_rows(x, w.mT, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, w, ends = ctx.saved_tensors
        dout = dout.contiguous()
        dx = by_rows(dout, w, ends) if ctx.needs_input_grad[0] else None
        dw = by_groups(dout, x, ends) if ctx.needs_input_grad[1] else None
        return dx, dw, None


def by_rows(x: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`x w_e`: `[S, K]` and `[E, K, N]` -> `[S, N]`."""
    if _at_once(x, w):
        return F.grouped_mm(x, w, offs=ends)
    out = x.new_zeros((x.shape[0], w.shape[2]))
    for group, rows in _groups(ends):
        torch.mm(x[rows], w[group], out=out[rows])
    return out


def by_groups(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """`a_e^T b_e` of the rows of each group: `[S, N]` and `[S, K]` -> `[E, N, K]`, 0 for a group without rows."""
    if _at_once(a, b):
        return F.grouped_mm(a.mT, b, offs=ends)
    out = a.new_zeros((ends.shape[0], a.shape[1], b.shape[1]))
    for group, rows in _groups(ends):
        torch.mm(a[rows].mT, b[rows], out=out[group])
    return out


def one_by_one(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether groups are multiplied one after the other whatever their sizes, which the host is asked for then.

    Such a pass cannot be recorded, and one that is begun to be leaves torch's allocator in the middle of it.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return True
    return torch.cuda.get_device_capability(device)[0] not in AT_ONCE


def _at_once(*tensors: torch.Tensor) -> bool:
    if any(one_by_one(t.device, t.dtype) for t in tensors):
        return False
    return all(
        t.numel() > 0
        and t.data_ptr() % ALIGNED == 0
        and max(t.shape[-2:]) > 1
        and all(stride == 1 or stride * t.element_size() % ALIGNED == 0 for stride in t.stride())
        for t in tensors
    )


def _groups(ends: torch.Tensor) -> list[tuple[int, slice]]:
    """The groups that have rows."""
    found, first = [], 0
    for group, end in enumerate(ends.tolist()):
        if end > first:
            found.append((group, slice(first, end)))
        first = end
    return found
