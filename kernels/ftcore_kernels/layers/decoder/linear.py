"""Linear modules that share an input, as one product: read from the model, multiplied, and differentiated by hand.

A module may be a plain `nn.Linear`, one of bitsandbytes' NF4 layers, or either of them under PEFT's LoRA. They are read
anew for every forward pass, so that merging, disabling or replacing an adapter takes effect at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ftcore_kernels.reference.lora_rope import Update

Tensors = tuple[torch.Tensor, torch.Tensor]

WIDEST_UPDATE = 64
"""Ranks up to this are added inside the kernels that read the product anyway; higher ones by a matrix product."""


class Uncovered(Exception):
    """The call or the module is not what the manual layer computes; the text says why."""


class Source(NamedTuple):
    """One linear module, and the LoRA that is active on it."""

    base: nn.Module
    a: nn.Parameter | None = None
    """`[r, K]`."""
    b: nn.Parameter | None = None
    """`[N, r]`."""
    scale: float = 1.0


def read(module: nn.Module) -> Source:
    """The base layer of a module and its active adapter. Raises Uncovered for what the layer does not compute."""
    if "lora_A" not in module._modules:
        return Source(_known(module))
    layer: Any = module
    base = _known(layer.base_layer)
    if layer.disable_adapters and not layer.merged_adapters:
        return Source(base)
    if layer.merged_adapters:
        raise Uncovered("an adapter is merged")
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return Source(base)
    if len(active) > 1:
        raise Uncovered("several adapters are active")
    name = active[0]
    if layer.lora_variant.get(name) is not None:
        raise Uncovered("a LoRA variant is active")
    if layer.training and getattr(layer.lora_dropout[name], "p", 0.0):
        raise Uncovered("LoRA has dropout")
    a, b = layer.lora_A[name], layer.lora_B[name]
    if b.bias is not None:
        raise Uncovered("LoRA has a bias")
    return Source(base, a.weight, b.weight, float(layer.scaling[name]))


def _known(base: nn.Module) -> nn.Module:
    if type(base) is nn.Linear or is_nf4(base) or is_fp8(base):
        return base
    raise Uncovered(f"{type(base).__name__} is no linear layer that it knows")


def is_nf4(base: nn.Module) -> bool:
    """Whether bitsandbytes holds the weight as NF4."""
    state = getattr(base.weight, "quant_state", None)
    return state is not None and getattr(state, "quant_type", None) == "nf4"


def is_fp8(base: nn.Module) -> bool:
    """Whether the weight is ftcore's float8 with a scale per output channel."""
    return isinstance(base.weight, torch.Tensor) and base.weight.dtype == torch.float8_e4m3fn


class Fused:
    """Sources that share an input, for one forward and backward pass."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = sources
        self.widths = [int(source.base.out_features) for source in sources]  # type: ignore[arg-type]
        self.inputs = int(sources[0].base.in_features)  # type: ignore[arg-type]
        ranks = [source.a.shape[0] for source in sources if source.a is not None]
        self.rank = max(_padded(max(ranks)), 16) if ranks else 0
        self.trained = any(source.base.weight.requires_grad for source in sources)
        """Whether a base weight is trained: then its input is needed again."""
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Output features of all sources."""
        return sum(self.widths)

    @property
    def wants_input(self) -> bool:
        """Whether a gradient of the sources needs the product's input."""
        return self.trained or bool(self.rank)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, in the order of :meth:`gradients`."""
        found: list[nn.Parameter] = []
        for source in self.sources:
            candidates = (source.base.weight, source.base.bias, source.a, source.b)
            found += [p for p in candidates if isinstance(p, nn.Parameter) and p.requires_grad]
        return found

    # The low-rank update -------------------------------------------------------------------------------------------

    def shrink(self, x: torch.Tensor) -> torch.Tensor | None:
        """`x A^T` of every source side by side, `[M, P R]`."""
        return None if self.a is None else torch.mm(x, self.a.T)

    def update(self, xa: torch.Tensor | None, segments: int = 1) -> Update | None:
        """LoRA's part, where a kernel adds it to that many segments of columns."""
        if xa is None or self.b is None or self.rank > WIDEST_UPDATE:
            return None
        # A module that a family fused itself has one A for all its segments.
        return Update(xa, self.b, tuple(range(segments)) if len(self.sources) > 1 else (0,) * segments)

    def shrink_grad(
        self, dy: torch.Tensor, xa: torch.Tensor | None, grads: Gradients, lora_grads: Callable[..., Tensors]
    ) -> torch.Tensor | None:
        """The gradient of `x A^T`, `[M, P R]`; those of B are left in `grads`."""
        if self.b is None or xa is None:
            return None
        if self.rank <= WIDEST_UPDATE and len(self.widths) <= 3:
            dxa, db = lora_grads(dy, xa, self.b, self.widths, [source.scale for source in self.sources])
        else:
            dxa = dy.new_empty((dy.shape[0], len(self.sources) * self.rank))
            db = torch.empty(self.b.shape, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
            for index, columns in enumerate(self._columns()):
                torch.mm(dy[:, columns], self.b[columns], out=dxa[:, self._block(index)])
                db[columns] = wide_mm(dy[:, columns].T, xa[:, self._block(index)]) * self.sources[index].scale
        for source, columns in zip(self.sources, self._columns(), strict=True):
            if source.b is not None and source.b.requires_grad:
                grads[source.b] = db[columns, : source.b.shape[1]]
        return dxa

    # The products --------------------------------------------------------------------------------------------------

    def product(self, x: torch.Tensor, dense: Dense, xa: torch.Tensor | None = None) -> torch.Tensor:
        """`x W^T + bias` of every source side by side, `[M, N]`; with LoRA's part if `xa` is given."""
        if is_fp8(self.sources[0].base):
            y = dense.fp8_product(self, x)
            if xa is not None and self.b is not None:
                for index, columns in enumerate(self._columns()):
                    y[:, columns].addmm_(xa[:, self._block(index)], self.b[columns].T)
            return self._biased(y)
        y = x.new_empty((x.shape[0], self.width))
        started = xa is not None and self.b is not None
        if started:
            # The small product first: the large one's epilogue adds to it, and no pass over y is spent.
            for index, columns in enumerate(self._columns()):
                torch.mm(xa[:, self._block(index)], self.b[columns].T, out=y[:, columns])  # type: ignore[index]
        for columns, weight in dense.weights(self, x.dtype):
            if started:
                y[:, columns].addmm_(x, weight.T)
            else:
                torch.mm(x, weight.T, out=y[:, columns])
        return self._biased(y)

    def in_kernel(self, xa: torch.Tensor | None) -> bool:
        """Whether a kernel adds LoRA's part, so that the product need not."""
        return xa is not None and self.rank <= WIDEST_UPDATE

    def product_grad(self, dy: torch.Tensor, dense: Dense, dxa: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the input: `dy W`, and `dxa A` if given, `[M, K]`."""
        if is_fp8(self.sources[0].base):
            dx = dense.fp8_product_grad(self, dy)
            if dxa is not None and self.a is not None:
                dx.addmm_(dxa, self.a)
            return dx
        dx = dy.new_empty((dy.shape[0], self.inputs))
        started = dxa is not None and self.a is not None
        if started:
            torch.mm(dxa, self.a, out=dx)  # type: ignore[arg-type]
        for columns, weight in dense.weights(self, dy.dtype):
            if started:
                dx.addmm_(dy[:, columns], weight)
            else:
                torch.mm(dy[:, columns], weight, out=dx)
            started = True
        return dx

    def _biased(self, y: torch.Tensor) -> torch.Tensor:
        for source, columns in zip(self.sources, self._columns(), strict=True):
            if source.base.bias is not None:
                y[:, columns] += source.base.bias
        return y

    # The gradients of what is trained ------------------------------------------------------------------------------

    def gradients(self, grads: Gradients, dy: torch.Tensor, x: torch.Tensor | None, dxa: torch.Tensor | None) -> None:
        """Leave the gradients of weights, biases and A in `grads`."""
        weights = None
        if self.trained and x is not None:
            weights = torch.mm(dy.T, x)
        da = wide_mm(dxa.T, x) if dxa is not None and x is not None else None
        for index, (source, columns) in enumerate(zip(self.sources, self._columns(), strict=True)):
            if weights is not None and source.base.weight.requires_grad:
                grads[source.base.weight] = weights[columns]  # type: ignore[index]
            if source.base.bias is not None and source.base.bias.requires_grad:
                grads[source.base.bias] = dy[:, columns].sum(0, dtype=torch.float32)  # type: ignore[index]
            if da is not None and source.a is not None and source.a.requires_grad:
                grads[source.a] = da[index * self.rank : index * self.rank + source.a.shape[0]]

    def _columns(self) -> list[slice]:
        found, first = [], 0
        for width in self.widths:
            found.append(slice(first, first + width))
            first += width
        return found

    def _block(self, index: int) -> slice:
        return slice(index * self.rank, (index + 1) * self.rank)


class Gradients:
    """Gradients by parameter, in memory of their own or in `homes`, which are shaped like the parameters."""

    def __init__(self, homes: Mapping[nn.Parameter, torch.Tensor] | None = None) -> None:
        self._found: dict[int, torch.Tensor] = {}
        self._homes = {id(parameter): home for parameter, home in (homes or {}).items()}

    def __setitem__(self, parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        home = self._homes.get(id(parameter))
        self._found[id(parameter)] = gradient.to(parameter.dtype) if home is None else home.copy_(gradient)

    def of(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor | None]:
        """In the order of `parameters`."""
        return [self._found.get(id(parameter)) for parameter in parameters]


class Dense:
    """Weights as matrices, for the length of one pass through a layer: what is quantized is dequantized once."""

    def __init__(self, ops: Any) -> None:
        self._ops = ops
        self._held: dict[int, list[tuple[slice, torch.Tensor]]] = {}
        self.hold = False
        """Keep what is dequantized for a second use, which lets go of it."""

    def weights(self, fused: Fused, dtype: torch.dtype) -> list[tuple[slice, torch.Tensor]]:
        """Columns of the product and the weight `[N, K]` behind them: one for all where they are neighbours."""
        if (found := self._held.pop(id(fused), None)) is not None:
            return found
        if is_nf4(fused.sources[0].base):
            found = [(slice(0, fused.width), self._dequantized(fused, dtype))]
            if self.hold:
                self._held[id(fused)] = found
            return found
        tensors = [source.base.weight for source in fused.sources]
        if len(tensors) > 1 and neighbours(tensors):  # type: ignore[arg-type]
            first = tensors[0].detach()  # type: ignore[operator]
            return [(slice(0, fused.width), first.as_strided((fused.width, fused.inputs), (fused.inputs, 1)))]
        return list(zip(fused._columns(), tensors, strict=True))  # type: ignore[arg-type]

    def _dequantized(self, fused: Fused, dtype: torch.dtype) -> torch.Tensor:
        from ftcore_kernels.reference.nf4_dequantize import AbsmaxState

        parts = []
        for source in fused.sources:
            weight: Any = source.base.weight
            state = weight.quant_state
            nested = None
            if state.nested:
                inner = state.state2
                nested = AbsmaxState(inner.code, inner.absmax, state.offset, inner.blocksize)
            parts.append((weight.data, state.absmax, state.shape, state.blocksize, nested))
        device = parts[0][0].device
        out = torch.empty((fused.width, fused.inputs), dtype=dtype, device=device)
        for (packed, absmax, shape, blocksize, nested), rows in zip(parts, fused._columns(), strict=True):
            self._ops.nf4_dequantize(packed, absmax, shape, blocksize, dtype, nested, out=out[rows])
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
            for base, columns in zip(bases, fused._columns(), strict=True)
        ]
        return sum(parts[1:], parts[0])


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


def pack(all_fused: Sequence[Fused], dtype: torch.dtype) -> None:
    """Round A and scale times B of every source to the dtype of the products, in a handful of launches."""
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
        for place, (source, rows) in enumerate(zip(fused.sources, fused._columns(), strict=True)):
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


def neighbours(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether contiguous tensors of one width lie one behind the other in one storage."""
    storage = tensors[0].untyped_storage().data_ptr()
    end = tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end or tensor.untyped_storage().data_ptr() != storage or not tensor.is_contiguous():
            return False
        end += tensor.numel() * tensor.element_size()
    return True


def make_neighbours(tensors: Sequence[nn.Parameter]) -> None:
    """Move contiguous parameters of one width behind each other, so that one product can serve them all.

    Each keeps its values, shape and identity; only its memory moves.
    """
    if len(tensors) < 2 or neighbours(tensors) or len({(t.dtype, t.device, t.shape[1]) for t in tensors}) > 1:
        return
    whole = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, part in zip(tensors, whole.split([tensor.shape[0] for tensor in tensors]), strict=True):
        tensor.data = part


def wide_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product in fp32, whatever the dtype of its factors (fp64 stays)."""
    if a.dtype in (torch.float32, torch.float64):
        return torch.mm(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _padded(rank: int) -> int:
    return 1 << (rank - 1).bit_length()
