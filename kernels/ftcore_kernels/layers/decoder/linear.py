"""Linear modules that share an input, as one product: multiplied, and differentiated by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.sources import Source, is_fp8, is_nf4
from ftcore_kernels.layers.decoder.stack import Stack, border_of
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.lora_rope import Update

if TYPE_CHECKING:
    from ftcore_kernels.layers.decoder.dense import Dense

Tensors = tuple[torch.Tensor, torch.Tensor]

WIDEST_UPDATE = 64
"""Ranks up to this are added inside the kernels that read the product anyway; higher ones by a matrix product."""


class Fused:
    """Sources that share an input, for one forward and backward pass.

    M rows, K inputs, N outputs of all P sources, R the padded rank. Rows of a product may be columns of a wider buffer,
    beside which its border stands: `x A^T` in the forward, the gradient of that in the backward. Raises Uncovered for
    sources of which some are quantized.
    """

    def __init__(self, sources: Sequence[Source], stack: Stack | None = None) -> None:
        if len({(is_nf4(source.base), is_fp8(source.base), source.base.weight.dtype) for source in sources}) > 1:
            raise Uncovered("weights that share an input are of different kinds")
        self.sources = sources
        self.widths = [int(source.base.out_features) for source in sources]  # type: ignore[arg-type]
        self.inputs = int(sources[0].base.in_features)  # type: ignore[arg-type]
        self.rank = padded_rank([source.a.shape[0] for source in sources if source.a is not None])
        self.trained = any(source.base.weight.requires_grad for source in sources)
        """Whether a base weight is trained: then its input is needed again."""
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        weights = [source.base.weight for source in sources]
        self.stack = stack if stack is not None and stack.holds(weights) else None  # type: ignore[arg-type]
        self.few: Callable[[torch.Tensor], torch.Tensor | None] | None = None
        """Of few rows `[M, K]`, the product with the weights and A as they lie, `[M, N + P R]`; None of too many."""
        self._token = object()
        needed = border_of(len(sources), self.rank)
        room = needed if is_nf4(sources[0].base) else 0 if self.stack is None else self.stack.spare
        self.border = needed if room >= needed else 0
        """Rows below the weights, and columns beside the product, that A takes."""

    @cached_property
    def width(self) -> int:
        """Output features of all sources."""
        return sum(self.widths)

    @cached_property
    def columns(self) -> list[slice]:
        """Of each source's outputs."""
        ends = [sum(self.widths[: index + 1]) for index in range(len(self.widths))]
        return [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]

    @property
    def wants_input(self) -> bool:
        """Whether a gradient of the sources needs the product's input."""
        return self.trained or bool(self.rank)

    @property
    def in_kernel(self) -> bool:
        """Whether a kernel that reads the product adds LoRA's part, so that the product need not."""
        return 0 < self.rank <= WIDEST_UPDATE

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of :meth:`gradients`."""
        found: list[nn.Parameter] = []
        for source in self.sources:
            candidates = (source.base.weight, source.base.bias, source.a, source.b)
            found += [p for p in candidates if isinstance(p, nn.Parameter) and p.requires_grad]
        return found

    # The border ----------------------------------------------------------------------------------------------------

    def claim_border(self) -> torch.Tensor | None:
        """Where A is to stand below the weights, if it has a place there."""
        if not self.border or self.stack is None:
            return None
        return self.stack.claim(len(self.sources) * self.rank, self._token)

    def put_border(self) -> None:
        """See that A stands below the weights: another pass may have put its own there."""
        if self.stack is not None and self.stack.owner is not self._token and self.a is not None:
            place = self.claim_border()
            if place is not None:
                place.copy_(self.a)

    def rows(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Memory for a gradient of the product `[M, N]`, with its border beside it."""
        return like.new_empty((number, self.width + self.border))[:, : self.width]

    def _with_border(self, rows: torch.Tensor) -> torch.Tensor | None:
        """`[M, N + P]` around `[M, N]`, if that was made with a border."""
        whole = self.width + self.border
        return rows.as_strided((rows.shape[0], whole), (whole, 1)) if self.border and rows.stride(0) == whole else None

    # The low-rank update -------------------------------------------------------------------------------------------

    def update(self, xa: torch.Tensor | None, segments: int = 1) -> Update | None:
        """LoRA's part, where a kernel adds it to that many segments of columns."""
        if xa is None or self.b is None or not self.in_kernel:
            return None
        # A module that a family fused itself has one A for all its segments.
        return Update(xa, self.b, tuple(range(segments)) if len(self.sources) > 1 else (0,) * segments)

    def shrink_grad(
        self, dy: torch.Tensor, xa: torch.Tensor | None, grads: Gradients, lora_grads: Callable[..., Tensors]
    ) -> torch.Tensor | None:
        """The gradient of `x A^T`, `[M, P R]`, beside `dy` if there is a border; those of B are left in `grads`."""
        if self.b is None or xa is None:
            return None
        whole, place = self._with_border(dy), None
        if whole is not None:
            place = whole[:, self.width : self.width + xa.shape[1]]
            if self.border > xa.shape[1]:
                whole[:, self.width + xa.shape[1] :] = 0
        if self.in_kernel and len(self.widths) <= 3:
            dxa, db = lora_grads(dy, xa, self.b, self.widths, [source.scale for source in self.sources], place)
        else:
            db = torch.empty(self.b.shape, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
            for index, columns in enumerate(self.columns):  # before dxa, which may be written over xa
                db[columns] = wide_mm(dy[:, columns].T, xa[:, self._block(index)]) * self.sources[index].scale
            dxa = dy.new_empty(xa.shape) if place is None else place
            for index, columns in enumerate(self.columns):
                torch.mm(dy[:, columns], self.b[columns], out=dxa[:, self._block(index)])
        for source, columns in zip(self.sources, self.columns, strict=True):
            if source.b is not None and source.b.requires_grad:
                grads[source.b] = db[columns, : source.b.shape[1]]
        return dxa

    # The products --------------------------------------------------------------------------------------------------

    def product(
        self, x: torch.Tensor, dense: Dense, xa: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`x W^T + bias` of every source side by side `[M, N]`, and `x A^T` likewise `[M, P R]`.

        :param xa: The latter, if it is known.
        :returns: The former with LoRA's part, unless that is left to a kernel. Both may be columns of one buffer.
        """
        fp8 = is_fp8(self.sources[0].base)
        few = None if self.few is None else self.few(x)
        whole = None if fp8 or few is not None else dense.whole(self, x.dtype)
        if few is not None:
            y, xa = few[:, : self.width], None if self.a is None else few[:, self.width :]
        elif whole is not None and self.border:
            y = x.new_empty((x.shape[0], self.width + self.border))
            torch.mm(x, whole.T, out=y)
            xa = y[:, self.width : self.width + len(self.sources) * self.rank]
            y = y[:, : self.width]
        else:
            if xa is None and self.a is not None:
                xa = torch.mm(x, self.a.T)
            if fp8:
                y = dense.fp8_product(self, x)
            else:
                y = x.new_empty((x.shape[0], self.width))
                for columns, weight in self._matrices(whole):
                    torch.mm(x, weight.T, out=y[:, columns])
        if xa is not None and self.b is not None and not self.in_kernel:
            for index, columns in enumerate(self.columns):
                y[:, columns].addmm_(xa[:, self._block(index)], self.b[columns].T)
        for source, columns in zip(self.sources, self.columns, strict=True):
            if source.base.bias is not None:
                y[:, columns] += source.base.bias
        return y, xa

    def product_grad(self, dy: torch.Tensor, dense: Dense, dxa: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the input: `dy W`, and `dxa A` if given, `[M, K]`."""
        if is_fp8(self.sources[0].base):
            dx = dense.fp8_product_grad(self, dy)
            if dxa is not None and self.a is not None:
                dx.addmm_(dxa, self.a)
            return dx
        dx, whole, bordered = dy.new_empty((dy.shape[0], self.inputs)), dense.whole(self, dy.dtype), None
        if dxa is not None:
            bordered = self._with_border(dy)
        if whole is not None and bordered is not None:
            return torch.mm(bordered, whole, out=dx)
        started = dxa is not None and self.a is not None
        if started:
            # The small product first: the large one's epilogue adds to it, and no pass over dx is spent.
            torch.mm(dxa, self.a, out=dx)  # type: ignore[arg-type]
        for columns, weight in self._matrices(whole):
            if started:
                dx.addmm_(dy[:, columns], weight)
            else:
                torch.mm(dy[:, columns], weight, out=dx)
            started = True
        return dx

    def _matrices(self, whole: torch.Tensor | None) -> list[tuple[slice, torch.Tensor]]:
        """Columns of the product and the weight `[N, K]` behind them: one for all where they are one matrix."""
        if whole is not None:
            return [(slice(0, self.width), whole[: self.width])]
        return [(columns, source.base.weight) for columns, source in zip(self.columns, self.sources, strict=True)]  # type: ignore[misc]

    # The gradients of what is trained ------------------------------------------------------------------------------

    def gradients(self, grads: Gradients, dy: torch.Tensor, x: torch.Tensor | None, dxa: torch.Tensor | None) -> None:
        """Leave the gradients of weights, biases and A in `grads`."""
        weights = None
        if self.trained and x is not None:
            weights = torch.mm(dy.T, x)
        da = wide_mm(dxa.T, x) if dxa is not None and x is not None else None
        for index, (source, columns) in enumerate(zip(self.sources, self.columns, strict=True)):
            if weights is not None and source.base.weight.requires_grad:
                grads[source.base.weight] = weights[columns]  # type: ignore[index]
            if source.base.bias is not None and source.base.bias.requires_grad:
                grads[source.base.bias] = dy[:, columns].sum(0, dtype=torch.float32)  # type: ignore[index]
            if da is not None and source.a is not None and source.a.requires_grad:
                grads[source.a] = da[index * self.rank : index * self.rank + source.a.shape[0]]

    def _block(self, index: int) -> slice:
        return slice(index * self.rank, (index + 1) * self.rank)


def border_for(modules: Sequence[Any]) -> int:
    """The border of the modules' product, for the highest rank of the adapters that they have now."""
    if is_fp8(getattr(modules[0], "base_layer", modules[0])):
        return 0
    return border_of(
        len(modules), padded_rank([rank for module in modules for rank in getattr(module, "r", {}).values()])
    )


def padded_rank(ranks: Sequence[int]) -> int:
    """The rank that the kernels compute with: a power of two from 16 on, or 0 where there is no LoRA."""
    return max(1 << (max(ranks) - 1).bit_length(), 16) if ranks else 0


def wide_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in fp32, whatever the dtype of its factors (fp64 stays)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
