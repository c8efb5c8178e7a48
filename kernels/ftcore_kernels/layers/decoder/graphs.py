"""CUDA graphs of a layer's forward and backward, for batches whose kernels are shorter than their launches.

A shape of batch runs as usual until every kernel in it is compiled and every plan made; then its launches are recorded
once per layer and replayed. Layers are chained through memory: a layer reads where the one before it wrote, so that a
step copies the batch once, not once per layer. All graphs of a model share a pool of memory. That is safe because a
batch's forward and backward are over before the next batch's begin; where they are not (two forwards before a
backward), the second one runs as usual. And because all layers record a shape in the same batch, while what each keeps
is still there; a layer that records later than others has a pool of that batch's own (`Shared.pool_of`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ftcore_kernels.layers.decoder import steps
from ftcore_kernels.layers.decoder.function import trained
from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.packing import pack
from ftcore_kernels.layers.decoder.parts import Kept, Layer
from ftcore_kernels.layers.decoder.pools import Pool

SEEN_BEFORE = 2
"""Times a shape runs as usual first."""
SHAPES = 8
"""Recorded shapes of a layer; every further one runs as usual."""

SHAPE = 0
"""Place of the batch's shape in a key."""
STATE = 4
"""Place of the layer's state in a key: which adapters, which weights, what is trained."""

Key = tuple[Any, ...]
Tables = tuple[torch.Tensor, ...]


class Shared:
    """What the layers of a model share: memory, a stream to record on, tables of the batch, gradients going down."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self.stream):
            # cuBLAS takes a workspace for each stream, which must not come from the pool of a graph.
            some = torch.zeros((8, 8), dtype=torch.bfloat16, device=device)
            torch.mm(some, some)
        torch.cuda.current_stream(device).wait_stream(self.stream)
        self._begin()

    def _begin(self) -> None:
        self._pool = Pool()
        self._tables: dict[Key, Tables] = {}
        self._sources: dict[Key, torch.Tensor] = {}
        self._down: dict[Key, tuple[torch.Tensor, torch.Tensor]] = {}
        self.batch, self._layer = 0, -1
        self._late: Pool | None = None

    def pass_by(self, index: int) -> None:
        """Layer `index` begins its forward: where that is not behind the one before, another batch does."""
        if index <= self._layer:
            self.batch, self._late = self.batch + 1, None
        self._layer = index

    def pool_of(self, late: bool) -> Pool:
        """Memory to record in: the common one, or, for whoever is late, one that is this batch's alone.

        In the common one, what layers keep that were recorded before counts as free, and they write it in this batch.
        """
        if not late:
            return self._pool
        self._late = self._late or Pool()
        return self._late

    def tables(self, key: Key, *tables: torch.Tensor) -> Tables:
        """The recorded place of the tables of angles and of attention's own, with this batch's in it."""
        key = (*key, *((table.shape, table.dtype) for table in tables))
        if key not in self._tables:
            self._tables[key] = tuple(table.clone() for table in tables)
        elif self._sources[key] is not tables[0]:  # the first layer of a batch copies for all
            for place, table in zip(self._tables[key], tables, strict=True):
                place.copy_(table)
        self._sources[key] = tables[0]
        return self._tables[key]

    def down(self, like: torch.Tensor, index: int) -> torch.Tensor:
        """Where layer `index` leaves the gradient of its input: two places, turn about."""
        key = (like.shape, like.dtype)
        if key not in self._down:
            self._down[key] = torch.empty_like(like), torch.empty_like(like)
        return self._down[key][index % 2]


class Flight:
    """Lives as long as somebody may still run the backward of a replayed forward."""

    over = False


class Record:
    """One layer and one shape: two graphs and the memory that they read and write."""

    def __init__(
        self, layer: Layer, keep: Keep, shared: Shared, index: int, homes: dict[nn.Parameter, torch.Tensor],
        dx_wanted: bool, is_late: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.layer, self.keep, self.shared, self.index, self.is_late = layer, keep, shared, index, is_late
        self.whole_since: int | None = None
        """The batch in which its backward was recorded as well."""
        self.parameters, self.dx_wanted = trained(layer), dx_wanted
        self.pointers = [parameter.data_ptr() for parameter in self.parameters]
        self.entry: torch.Tensor | None = None
        self.out: torch.Tensor | None = None
        self.dout: torch.Tensor | None = None
        self.dx: torch.Tensor | None = None
        self.grads: list[torch.Tensor | None] = []
        self._forward = torch.cuda.CUDAGraph()
        self._backward: torch.cuda.CUDAGraph | None = None
        self._kept: Kept | None = None
        self._homes = homes
        self._into = torch.empty(0)
        self._broken = False

    def same(self) -> bool:
        """Whether the trained parameters are where they were, and all of it was recorded."""
        return not self._broken and self.pointers == [parameter.data_ptr() for parameter in self.parameters]

    def forward(self, hidden: torch.Tensor, before: Record | None) -> torch.Tensor:
        """Replay, or record and replay, the forward of `[B, S, H]`."""
        if self.entry is None:
            follows = before is not None and before.out is not None and before.out.data_ptr() == hidden.data_ptr()
            self.entry = hidden.detach() if follows else hidden.detach().clone(memory_format=torch.contiguous_format)
            self._record(self._forward, self._steps_forward)
        elif self.entry.data_ptr() != hidden.data_ptr():
            self.entry.copy_(hidden)
        for fused in self.layer.fused:
            fused.claim_border()  # the replay writes it
        self._forward.replay()
        assert self.out is not None
        return self.out.detach()

    def backward(self, dout: torch.Tensor) -> list[torch.Tensor | None]:
        """Replay, or record and replay, the backward: the gradients of the input and of the parameters."""
        if self.dout is None:
            self.dout = self.shared.down(dout, self.index + 1)
        if self.dout.data_ptr() != dout.data_ptr():
            self.dout.copy_(dout)
        for parameter in self.parameters:
            # A gradient that was not cleared since the last replay lives in the memory that this one writes.
            home, grad = self._homes.get(parameter), parameter.grad
            if home is not None and grad is not None and grad.data_ptr() == home.data_ptr():
                parameter.grad = grad.clone()
        if self._backward is None:
            self._backward = torch.cuda.CUDAGraph()
            # Not from the graphs' memory: where micro-batches add up, gradients outlive the next forward, and its
            # replay writes over everything that was free when it was recorded.
            for parameter in self.parameters:
                if parameter not in self._homes:
                    self._homes[parameter] = torch.empty_like(parameter)
            self._into = self.shared.down(dout, self.index)
            self._record(self._backward, self._steps_backward)
            self.whole_since = self.shared.batch
        for fused in self.layer.fused:
            fused.put_border()
        self._backward.replay()
        found = [self.dx, *self.grads]
        return [None if grad is None else grad.detach() for grad in found]

    def _steps_forward(self) -> None:
        assert self.entry is not None
        pack(self.layer.fused, self.entry.dtype)
        out, kept = steps.forward(self.layer, self.entry.view(-1, self.entry.shape[-1]))
        kept.reduce(self.keep, self.layer)
        self.out, self._kept = out.view(self.entry.shape), kept

    def _steps_backward(self) -> None:
        assert self.dout is not None and self._kept is not None
        kept, self._kept, into = self._kept, None, self._into
        grads = Gradients(self._homes)
        dx = steps.backward(
            self.layer, kept, self.dout.view(-1, self.dout.shape[-1]), grads, self.dx_wanted,
            into=into.view(-1, into.shape[-1]),
        )  # fmt: skip
        self.dx = into if dx is not None and self.dx_wanted else None
        self.grads = grads.of(self.parameters)

    def _record(self, graph: torch.cuda.CUDAGraph, launches: Callable[[], None]) -> None:
        stream, current = self.shared.stream, torch.cuda.current_stream()
        self._broken = True  # until it is whole: the memory may be short
        stream.wait_stream(current)
        with torch.cuda.stream(stream), torch.no_grad(), torch.autocast("cuda", enabled=False):
            pool = self.shared.pool_of(self.is_late()).handle(graph)
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                launches()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        self._broken = False


class Graphs:
    """The recorded shapes of one layer, which follows another one in the model."""

    def __init__(self, before: Graphs | None) -> None:
        self._before = before
        self._index: int = 0 if before is None else before._index + 1
        self._made: list[Shared] = [] if before is None else before._made
        self._chain: list[Graphs] = [] if before is None else before._chain
        self._chain.append(self)
        self._records: dict[Key, Record] = {}
        self._latest: Record | None = None
        self._homes: dict[nn.Parameter, torch.Tensor] = {}
        """Where the layer's gradients are left, by all its records."""
        self._seen: dict[Key, int] = {}
        self._flight: weakref.ref[Flight] | None = None
        self._forgot = 0

    @property
    def shapes(self) -> int:
        """Shapes that are recorded."""
        return len(self._records)

    def ready(self, key: Key) -> Record | None:
        """The record of a shape, unless a batch is still on its way or the parameters moved."""
        for shared in self._made:
            shared.pass_by(self._index)
        record = self._records.get(key)
        if record is None or self._in_flight():
            return None
        if not record.same():
            del self._records[key]
            return None
        return record

    def due(self, key: Key) -> bool:
        """Count a batch that would run as usual; whether its shape did so often enough to be recorded."""
        if self._forgot > 1 or self._in_flight():
            return False
        if len(self._records) >= SHAPES:
            self._drop_others(key)
        if len(self._records) >= SHAPES:
            return False
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] > SEEN_BEFORE

    def forget(self) -> None:
        """Let go of all records and their memory, after there was too little; the second time nothing is recorded more.

        The pool is another one afterwards: somebody may still hold what is in this one.
        """
        self._made.clear()
        self._records.clear()
        self._seen.clear()
        self._homes = {}  # another one: a backward that is still to come looks into the old
        self._latest, self._flight = None, None
        self._forgot += 1

    def _drop_others(self, key: Key) -> None:
        """Those of a state of the layer that it is not in any more: nobody will ask for them."""
        for gone in [other for other in self._records if other[STATE] != key[STATE]]:
            del self._records[gone]
        kept = {id(parameter) for record in self._records.values() for parameter in record.parameters}
        for parameter in [parameter for parameter in self._homes if id(parameter) not in kept]:
            del self._homes[parameter]

    def record(self, key: Key, layer: Layer, keep: Keep, kind: Key, dx_wanted: bool) -> Record:
        """A new record, still empty."""
        if self._before is None:
            # What the batches before left in the allocator would stay there beside the graphs' own memory, and while
            # a graph is recorded the allocator cannot give anything back.
            torch.cuda.empty_cache()
        if not self._made:
            self._made.append(Shared(layer.cos.device))
        shared = self._made[0]
        layer.cos, layer.sin, *more = shared.tables(kind, layer.cos, layer.sin, *layer.attention.tables)
        layer.attention.tables = tuple(more)
        is_late = partial(self._is_late, key[SHAPE], shared)
        record = self._records[key] = Record(layer, keep, shared, self._index, self._homes, dx_wanted, is_late)
        return record

    def _is_late(self, shape: torch.Size, shared: Shared) -> bool:
        """Whether another layer was recorded for this shape in a batch before, and may be replayed in this one."""
        others = (graphs._records.items() for graphs in self._chain if graphs is not self)
        return any(
            key[SHAPE] == shape and record.whole_since is not None and record.whole_since < shared.batch
            for records in others
            for key, record in records
        )

    def replay(self, record: Record, hidden: torch.Tensor, tables: Tables, kind: Key) -> torch.Tensor:
        """The layer's output `[B, S, H]`, differentiable."""
        record.shared.tables(kind, *tables)
        flight = Flight()
        self._flight, self._latest = weakref.ref(flight), record
        before = None if self._before is None else self._before._latest
        out: torch.Tensor = _Replayed.apply(hidden, record, before, flight, *record.parameters)
        return out

    def _in_flight(self) -> bool:
        flight = self._flight() if self._flight is not None else None
        return flight is not None and not flight.over


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, record: Record, before: Record | None, flight: Flight, *_: nn.Parameter
    ) -> torch.Tensor:
        ctx.record, ctx.flight = record, flight
        return record.forward(hidden, before)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.flight.over:
            raise RuntimeError("this layer's backward writes over what it kept: it can run once per forward")
        dx, *grads = ctx.record.backward(dout)
        ctx.flight.over = True
        return dx, None, None, None, *grads
