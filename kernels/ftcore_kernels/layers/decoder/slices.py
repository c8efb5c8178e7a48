"""Some outputs, or some inputs, of a fused product, as a product of its own.

A group of heads is rows of the query, key and value projections and columns of the output projection. What LoRA's A
gives, `x A^T`, belongs to all groups alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.linear import Fused
from ftcore_kernels.layers.decoder.sources import Source, is_fp8
from ftcore_kernels.layers.decoder.stack import Stack


@dataclass(slots=True, eq=False)
class Base:
    """What a product needs of a base layer."""

    weight: torch.Tensor
    """`[n, k]`."""
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    """Of a float8 weight, `[n]`."""
    weight_t: torch.Tensor | None = None
    """Its transpose `[k, n]`, where there is one."""

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.weight.shape[1]


class Outputs:
    """Columns of a product `[M, N]`, in their order: the weights behind them copied one under the other."""

    def __init__(self, fused: Fused, columns: Sequence[slice], dense: Dense, dtype: torch.dtype) -> None:
        self.fused = fused
        self.rows = [_within(columns, own) for own in fused.columns]
        """Rows of each source's weight."""
        bases = _float8(fused, self.rows) if is_fp8(fused.sources[0].base) else self._bases(dense, dtype)
        for base, source in zip(bases, fused.sources, strict=True):
            base.weight.requires_grad_(source.base.weight.requires_grad)  # type: ignore[arg-type]
        sources = [source._replace(base=base) for source, base in zip(fused.sources, bases, strict=True)]  # type: ignore[arg-type]
        self.product = Fused(sources, self._stack)
        self.product.a = fused.a
        if fused.b is not None:
            self.product.b = torch.cat([fused.b[some] for some in columns])

    _stack: Stack | None = None

    def _bases(self, dense: Dense, dtype: torch.dtype) -> list[Base]:
        """Neighbours in one matrix."""
        whole = dense.whole(self.fused, dtype)
        pieces = []
        for source, own, rows in zip(self.fused.sources, self.fused.columns, self.rows, strict=True):
            weight = source.base.weight.detach() if whole is None else whole[own]  # type: ignore[operator]
            pieces.append([weight[some] for some in rows])
        together = torch.cat([piece for several in pieces for piece in several])
        self._stack = Stack(together, together.shape[0])
        widths = [sum(piece.shape[0] for piece in several) for several in pieces]
        return [
            Base(weight, _taken(source.base.bias, rows))  # type: ignore[arg-type]
            for weight, source, rows in zip(together.split(widths), self.fused.sources, self.rows, strict=True)
        ]

    def placed(self, whole: Placed) -> Gradients:
        """Where the product leaves its gradients, for them to come to their rows in `whole`."""
        rows: dict[int, tuple[nn.Parameter, list[slice]]] = {}
        for source, mine, some in zip(self.fused.sources, self.product.sources, self.rows, strict=True):
            parameters: list[Any] = [source.base.weight, source.base.bias, source.b]
            for parameter, key in zip(parameters, (mine.base.weight, mine.base.bias, mine.b), strict=True):
                if parameter is not None:
                    rows[id(key)] = parameter, some
        return _Rows(whole, rows)


class Placed:
    """Gradients of which each group of heads knows some rows: all of them, in the parameters' dtypes."""

    def __init__(self) -> None:
        self._whole: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}

    def put(self, parameter: nn.Parameter, rows: Sequence[slice], gradient: torch.Tensor) -> None:
        """Some rows of a parameter's gradient, in their order."""
        _, whole = self._whole.setdefault(id(parameter), (parameter, torch.empty_like(parameter)))
        for some, piece in zip(rows, gradient.split([r.stop - r.start for r in rows]), strict=True):
            whole[some] = piece

    def hand_over(self, grads: Gradients) -> None:
        """Leave them in `grads`."""
        for parameter, whole in self._whole.values():
            grads[parameter] = whole
        self._whole.clear()


class _Rows(Gradients):
    def __init__(self, whole: Placed, rows: dict[int, tuple[nn.Parameter, list[slice]]]) -> None:
        super().__init__()
        self._placed, self._rows = whole, rows

    def __setitem__(self, parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
        if gradient is not None:
            whole, rows = self._rows[id(parameter)]
            self._placed.put(whole, rows, gradient)


def inputs(fused: Fused, columns: slice, dense: Dense, dtype: torch.dtype) -> Fused:
    """Some inputs of a product of one source: what its gradient with respect to them needs."""
    (source,) = fused.sources
    base: Any = source.base
    if is_fp8(base):
        # As bytes: not every operation knows float8.
        weight = base.weight.detach().view(torch.uint8)[:, columns].contiguous().view(base.weight.dtype)
        part = Base(weight, None, base.scale, None if base.weight_t is None else base.weight_t[columns])
    else:
        whole = dense.whole(fused, dtype)
        part = Base((base.weight.detach() if whole is None else whole[: fused.width])[:, columns])
    product = Fused([Source(part)])  # type: ignore[arg-type]
    product.a = None if fused.a is None else fused.a[:, columns]
    return product


def _within(columns: Sequence[slice], own: slice) -> list[slice]:
    """Those of the columns that are a source's, counted from its first."""
    return [slice(c.start - own.start, c.stop - own.start) for c in columns if own.start <= c.start < own.stop]


def _taken(tensor: torch.Tensor | None, rows: Sequence[slice]) -> torch.Tensor | None:
    if tensor is None:
        return None
    return torch.cat([tensor.detach()[some] for some in rows]).requires_grad_(tensor.requires_grad)


def _float8(fused: Fused, rows: Sequence[Sequence[slice]]) -> list[Base]:
    """Neighbours in memory, as :func:`fp8.arrange_fp8` puts them: their input is quantized and multiplied once."""
    bases: list[Any] = [source.base for source in fused.sources]
    kind = bases[0].weight.dtype
    pairs = list(zip(bases, rows, strict=True))
    weight = torch.cat([b.weight.detach().view(torch.uint8)[some] for b, several in pairs for some in several])
    scale = torch.cat([b.scale[some] for b, several in pairs for some in several])
    weight_t = None
    if all(b.weight_t is not None for b in bases):
        turned = [b.weight_t.view(torch.uint8)[:, some] for b, several in pairs for some in several]
        weight_t = torch.cat(turned, dim=1).view(kind)
    made, first = [], 0
    for base, several in pairs:
        mine = slice(first, first + sum(some.stop - some.start for some in several))
        turned_over = None if weight_t is None else weight_t[:, mine]
        made.append(Base(weight[mine].view(kind), _taken(base.bias, several), scale[mine], turned_over))
        first = mine.stop
    return made
