"""Weights as matrices, for the length of one pass through a layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ftcore_kernels.layers.decoder.fp8 import fp8_whole
from ftcore_kernels.layers.decoder.linear import Fused
from ftcore_kernels.layers.decoder.sources import is_nf4, packed


class Dense:
    """What is quantized is dequantized once."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self._held: dict[int, torch.Tensor] = {}
        self._often: frozenset[int] = frozenset()
        self.hold = False
        """Keep what is dequantized for a second use, which lets go of it."""

    @contextmanager
    def held(self, *several: Fused) -> Iterator[None]:
        """Until this ends, each of these is dequantized once, however often it is used."""
        self._often = frozenset(map(id, several))
        try:
            yield
        finally:
            for each in self._often:
                self._held.pop(each, None)
            self._often = frozenset()

    def whole(self, fused: Fused, dtype: torch.dtype) -> torch.Tensor | None:
        """The weights and the border below them, `[N + P, K]`; None where they are no one matrix."""
        often = id(fused) in self._often
        if (found := self._held.get(id(fused))) is not None:
            if not often:
                del self._held[id(fused)]
            return found
        if is_nf4(fused.sources[0].base):
            found = self._dequantized(fused, dtype)
            if self.hold or often:
                self._held[id(fused)] = found
            return found
        if fused.stack is None:
            return None
        fused.put_border()
        return fused.stack.whole[: fused.width + fused.border]

    def _dequantized(self, fused: Fused, dtype: torch.dtype) -> torch.Tensor:
        parts = [packed(source.base) for source in fused.sources]
        device = parts[0].packed.device
        out = torch.empty((fused.width + fused.border, fused.inputs), dtype=dtype, device=device)
        for part, rows in zip(parts, fused.columns, strict=True):
            self._ops.nf4_dequantize(
                part.packed, part.absmax, part.shape, part.blocksize, dtype, part.nested, out=out[rows]
            )
        if fused.border and fused.a is not None:
            out[fused.width : fused.width + fused.a.shape[0]] = fused.a
            out[fused.width + fused.a.shape[0] :] = 0
        return out

    def fp8_product(self, fused: Fused, x: torch.Tensor) -> torch.Tensor:
        """`x W^T` `[M, N]` by the float8 product."""
        bases: Any = [source.base for source in fused.sources]
        if (whole := fp8_whole(bases)) is not None:
            return self._ops.fp8_mm(x, whole.weight, whole.scale)
        return torch.cat([self._ops.fp8_mm(x, base.weight, base.scale) for base in bases], dim=1)

    def fp8_product_grad(self, fused: Fused, dy: torch.Tensor) -> torch.Tensor:
        """`dy W` `[M, K]` by the float8 product, or by the unpacked weight where there is no transposed copy."""
        bases: Any = [source.base for source in fused.sources]
        if (whole := fp8_whole(bases)) is not None:
            return self._ops.fp8_mm_t(dy, whole.weight_t, whole.weight, whole.scale)
        parts = [
            self._ops.fp8_mm_t(dy[:, columns], base.weight_t, base.weight, base.scale)
            for base, columns in zip(bases, fused.columns, strict=True)
        ]
        return sum(parts[1:], parts[0])
