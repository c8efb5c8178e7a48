"""Float8 layers that share an input, as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class Fp8Whole(NamedTuple):
    """Neighbouring float8 layers as one: weight `[N, K]`, scale `[N]`, and the transposed copy `[K, N]` or None."""

    weight: torch.Tensor
    scale: torch.Tensor
    weight_t: torch.Tensor | None


def fp8_whole(bases: Sequence[Any]) -> Fp8Whole | None:
    """Float8 layers that :func:`arrange_fp8` put side by side, or a single one."""
    if len(bases) == 1:
        return Fp8Whole(bases[0].weight, bases[0].scale, bases[0].weight_t)
    weights, scales = [base.weight for base in bases], [base.scale for base in bases]
    if not (neighbours(weights) and neighbours(scales)):
        return None
    rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    first_t = bases[0].weight_t
    if first_t is not None:
        if first_t.stride(0) != rows:
            return None
        first_t = first_t.as_strided((columns, rows), (rows, 1))
    return Fp8Whole(
        weights[0].detach().as_strided((rows, columns), (columns, 1)), scales[0].as_strided((rows,), (1,)), first_t
    )


def arrange_fp8(bases: Sequence[Any]) -> None:
    """Move float8 layers that share an input side by side, so that their input is quantized and multiplied once."""
    if len(bases) < 2 or len({base.weight.shape[1] for base in bases}) > 1:
        return
    widths = [base.weight.shape[0] for base in bases]
    # As bytes: not every operation knows float8.
    weight = torch.cat([base.weight.detach().view(torch.uint8) for base in bases]).view(torch.float8_e4m3fn)
    scale = torch.cat([base.scale for base in bases])
    whole_t = None
    if all(base.weight_t is not None for base in bases):
        bytes_t = torch.cat([base.weight_t.view(torch.uint8) for base in bases], dim=1)
        whole_t = bytes_t.view(torch.float8_e4m3fn)
    first = 0
    for base, width in zip(bases, widths, strict=True):
        rows = slice(first, first + width)
        base.weight.data, base.scale = weight[rows], scale[rows]
        base.weight_t = None if whole_t is None else whole_t[:, rows]
        first += width


def neighbours(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether contiguous tensors of one width lie one behind the other in one storage."""
    storage = tensors[0].untyped_storage().data_ptr()
    end = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != storage or not tensor.is_contiguous():
            return False
        end += tensor.numel() * tensor.element_size()
    return True
