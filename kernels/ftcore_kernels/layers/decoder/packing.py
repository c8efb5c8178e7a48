"""LoRA's factors in the dtype of the products, once per forward pass, in a handful of launches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ftcore_kernels.layers.decoder.linear import Fused


def pack(all_fused: Sequence[Fused], dtype: torch.dtype) -> None:
    """Round A and scale times B of every source to the dtype of the products, and put A where the products find it."""
    adapted = [fused for fused in all_fused if fused.rank]
    if not adapted:
        return
    device = next(s.a.device for fused in adapted for s in fused.sources if s.a is not None)
    sizes = [len(f.sources) * f.rank * f.inputs for f in adapted] + [f.width * f.rank for f in adapted]
    padded = any(s.a is None or s.a.shape[0] != f.rank for f in adapted for s in f.sources)
    make = torch.zeros if padded else torch.empty
    pieces = make(sum(sizes), dtype=dtype, device=device).split(sizes)
    a_to, a_from, b_to, b_from, scales = [], [], [], [], []
    for index, fused in enumerate(adapted):
        fused.a = pieces[index].view(-1, fused.inputs)
        fused.b = pieces[len(adapted) + index].view(fused.width, fused.rank)
        for place, (source, rows) in enumerate(zip(fused.sources, fused.columns, strict=True)):
            if source.a is None or source.b is None:
                continue
            rank = source.a.shape[0]
            first = place * fused.rank
            a_to.append(fused.a[first : first + rank])
            a_from.append(source.a.detach())
            b_to.append(fused.b[rows] if rank == fused.rank else fused.b[rows, :rank])
            b_from.append(source.b.detach())
            scales.append(source.scale)
    if len(set(scales)) == 1:
        b_from = list(torch._foreach_mul(b_from, scales[0])) if scales[0] != 1.0 else b_from
    else:
        b_from = list(torch._foreach_mul(b_from, scales))
    torch._foreach_copy_(a_to + b_to, a_from + b_from)
    places = [(place, fused.a) for fused in adapted if (place := fused.claim_border()) is not None]
    if places:
        torch._foreach_copy_([place for place, _ in places], [a for _, a in places])  # type: ignore[misc]
