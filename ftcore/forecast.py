"""What a run will take of a GPU's and the host's memory, said from the plan alone: no weight is read, no GPU is needed.

Counted are what is held at all times (:mod:`ftcore.held`), what the layers keep for their backward, the largest work
that is done for a while, and the cache of keys and values where the model writes completions: by the very numbers that
`memory` decides by. What the allocator rounds up is not known here: `free` leaves room for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ftcore.config import Graphs, Memory
from ftcore.held import Held
from ftcore.memory import HOST_PART, OFFLOADED, head_bytes, host_room, layers_that_choose, micro_batch, width_of
from ftcore.planner import GIVEN_AWAY, POOL, Planner, for_recorded
from ftcore.specs import Passes, Plan, Recomputing
from ftcore.store import Store, sizes, stored

CONTEXT = 2**29
"""Bytes left for what CUDA and the libraries take for themselves: an allowance, not a measurement."""
WORKSPACES = 2**26
"""Bytes of cuBLAS's workspaces: 32 MiB for each of two streams."""
STEP = 256
"""Tokens that a row's length is found to."""
PROMPT = 256
"""Tokens of a prompt that is to be completed, where `trainer.max_length` leaves no room for one."""
LONGEST = 2**23
"""Tokens of a row that nobody looks beyond."""
ENDLESS = 2**62


def free(gibibytes: float) -> int:
    """Bytes of a GPU of that size which a run may plan with."""
    return max(0, int(gibibytes * 2**30 * (1 - GIVEN_AWAY)) - CONTEXT)


def allowed(plan: Plan, room: int) -> int:
    """Bytes that `memory=auto` plans with, of those that there are."""
    limit = plan.run.memory_limit
    return room if limit is None else min(room, int(limit * 2**30))


def host_free(plan: Plan, memory: Memory) -> int:
    """Bytes of host memory for the inputs of layers: of `host_memory`, or of what this machine has."""
    asked = plan.run.host_memory
    part = OFFLOADED if memory is Memory.offload else HOST_PART
    return host_room(part) if asked is None else int(part * asked * 2**30)


@dataclass(frozen=True)
class Layout:
    """How the layers of a model work on a batch of one shape."""

    levels: tuple[int, ...]
    """What each keeps: an index of its `levels`."""
    recorded: bool = False
    """Whether their launches are recorded."""
    tiled: bool = False
    store: Store | None = None
    """Where their inputs are; None keeps all of them on the GPU."""


@dataclass(frozen=True)
class Forecast(Held):
    """Of a run whose model, adapter and kernels are there without weights."""

    @classmethod
    def of(cls, plan: Plan, model: Any) -> Forecast | str:
        """Or why there is none: what is not counted."""
        assert plan.run.model is not None
        trainer, layers = plan.trainer, layers_that_choose(model)
        passes = None if trainer is None else trainer.passes or (Passes() if trainer.tokenized else None)
        if trainer is None or passes is None:
            return "what this trainer makes of a row is not counted (its `TrainerSpec.passes` would say)"
        if trainer.teacher:
            return "what a teacher takes is not counted"
        if getattr(plan.run.adapter, "path", None):
            return "what an adapter takes that goes on from a folder is not counted"
        if plan.family.vision is not None:
            return "what images take is not counted"
        if len(layers) != model.config.get_text_config().num_hidden_layers:
            return "layers of this run are transformers' own, and nobody has counted what those keep"
        for layer in layers:
            layer.width = width_of(plan.run.model.dtype)
        if plan.run.graphs is Graphs.auto:
            for before, layer in zip([None, *layers], layers, strict=False):
                layer.follow(before)
        return cls(plan, model, layers, passes)

    # -------------------------------------------------------------------------------------------------- a micro-batch

    def layout(self, memory: Memory, rows: int, length: int, limit: int = ENDLESS) -> Layout:
        """How the layers work on such a micro-batch, where the GPU has `limit` bytes.

        :param rows: Rows of the data set; a row may be several sequences.
        """
        rows *= self.passes.sequences
        number = len(self.layers)
        if memory is Memory.auto:
            return self._planned(rows, length, limit)
        if memory is Memory.off:
            levels = tuple(len(layer.levels(rows, length)) - 1 for layer in self.layers)
            return Layout(levels, any(layer.recorded > rows * length for layer in self.layers))
        host = max(host_free(self.plan, memory) - self.left(memory), 0) if memory is Memory.offload else 0
        room = limit - self._beside(memory, rows, length, tiled=True, recorded=False)
        store = stored(self.layers, rows, length, room, host)
        whole = not store.away and not store.made_again
        return Layout((0,) * number, tiled=True, store=None if whole else store)

    def _planned(self, rows: int, length: int, limit: int) -> Layout:
        """By the planner itself."""
        auto = Memory.auto

        def budget(rows: int, length: int, made: int, recorded: bool, tiled: bool) -> int:
            left = limit - self._beside(auto, rows, length, tiled, recorded)
            return for_recorded(left, self.layers, rows, length) if recorded else left

        with _as_they_were(self.layers):
            planner = Planner(self.layers, budget, lambda: host_free(self.plan, auto))
            planner.attach()
            levels = tuple(layer.choose(rows, length) for layer in self.layers if layer.choose is not None)
            first = self.layers[0]
            recorded, tiled = first.may_record and first.recorded > rows * length, first.tiled
        return Layout(levels, recorded, tiled, planner.store)

    def _beside(self, memory: Memory, rows: int, length: int, tiled: bool, recorded: bool) -> int:
        """Bytes of everything but what the layers keep, for so many sequences."""
        work, head = self._for_a_while(memory, rows, length, tiled)
        gone = sum(self.leaving) if memory is Memory.offload else 0
        recorded = recorded and any(layer.recorded > rows * length for layer in self.layers)
        # Recorded launches have memory of their own, which the head does not share.
        return self.fixed - gone + WORKSPACES + (work + head if recorded else max(work, head))

    def _for_a_while(self, memory: Memory, rows: int, length: int, tiled: bool) -> tuple[int, int]:
        """Bytes that a layer's backward takes, and those that the head does, for so many sequences."""
        work = max(layer.workspace(rows, length, tiled) for layer in self.layers) + self.dequantized
        head = head_bytes(self.model, rows, length, self.width)
        if self.passes.logprobs:
            # The final norm's output is kept for the logits that the backward computes again.
            head += self.width * rows * length * int(self.text.hidden_size)
        if memory is Memory.offload:
            head += self.leaving[1]
        return work, head

    def kept(self, layout: Layout, rows: int, length: int) -> int:
        """Bytes of the GPU that the layers keep, for so many sequences."""
        of_layer, store = sizes(self.layers, rows, length), layout.store
        if store is not None and store.made_again:
            return store.gpu_bytes(of_layer)
        kept = sum(
            layer.levels(rows, length)[level].kept for layer, level in zip(self.layers, layout.levels, strict=True)
        )
        away = 0
        if store is not None:
            away = (len(self.layers) - store.held) * of_layer.input - store.attended_bytes(of_layer)
        return int((kept - away) * (1 + POOL if layout.recorded else 1))

    def peak(self, memory: Memory, rows: int, length: int, limit: int = ENDLESS) -> int:
        """Bytes of the GPU at the most, for a micro-batch of that many rows of so many tokens."""
        layout, sequences = self.layout(memory, rows, length, limit), rows * self.passes.sequences
        return max(self._training(memory, layout, rows, sequences, length), self.writing(memory, 1, length))

    def _training(self, memory: Memory, layout: Layout, rows: int, sequences: int, length: int) -> int:
        """While a micro-batch is learnt from."""
        kept = self.kept(layout, sequences, length)
        beside = self._beside(memory, sequences, length, layout.tiled, layout.recorded)
        assert self.plan.run.trainer is not None
        if layout.recorded or layout.store is not None or self.plan.run.trainer.global_batch > rows:
            return kept + beside  # graphs hold what is kept, or the gradients of a micro-batch before are there
        # As the backward goes down, layers let go of what they kept, and gradients come.
        work, head = self._for_a_while(memory, sequences, length, layout.tiled)
        without = beside - max(work, head) - self.gradients
        above = self.head_gradient
        begun = kept + max(head + 2 * above, above + work + (self.gradients - above) // len(self.layers))
        ended = kept // len(self.layers) + self.gradients + max(work, above)
        return without + max(begun, ended)

    def host(self, memory: Memory, rows: int, length: int, limit: int = ENDLESS) -> int:
        """Bytes of host memory for inputs of layers, and for the weights that `offload` leaves there."""
        store = self.layout(memory, rows, length, limit).store
        inputs = 0 if store is None else store.host_bytes(sizes(self.layers, rows * self.passes.sequences, length))
        return inputs + self.left(memory)

    def left(self, memory: Memory) -> int:
        """Bytes of weights in host memory."""
        return sum(self.leaving) if memory is Memory.offload else 0

    # ---------------------------------------------------------------------------------------------------- completions

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of keys and values of one token of one row, in all layers."""
        text = self.text
        heads = int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        return 2 * heads * dim * len(self.layers) * self.width

    def writing(self, memory: Memory, rows: int, length: int) -> int:
        """Bytes of the GPU while so many completions are written at once; 0 where none is.

        There are no gradients then. The generator takes fewer rows where the memory is short: one has to fit.
        """
        if not self.passes.written:
            return 0
        gone = self.leaving[0] if memory is Memory.offload else 0
        there = self.fixed - self.gradients - gone + WORKSPACES
        logits = 16 * rows * int(self.text.vocab_size)  # in 32 bits, as probabilities, and what draws take
        return there + rows * length * self.row_bytes + logits + self._reading(rows * length)

    def _reading(self, tokens: int) -> int:
        """Bytes of a pass over prompts of so many tokens, or as many of them as the generator reads at once.

        All that a layer could keep, and half as much again: the activation, sums, queries and keys before their norm.
        """
        tokens = min(tokens, getattr(self.plan.run.generator, "prompt_tokens", tokens))
        return max(3 * layer.levels(1, tokens)[-1].kept // 2 for layer in self.layers)

    # -------------------------------------------------------------------------------------------------------- answers

    def fits(self, memory: Memory, rows: int, length: int, limit: int) -> bool:
        """Whether a micro-batch fits so many bytes of the GPU, and what waits in host memory what the host has."""
        if self.peak(memory, rows, length, limit) > limit:
            return False
        return self.host(memory, rows, length, limit) <= host_free(self.plan, memory)

    def longest(self, memory: Memory, limit: int) -> int:
        """Tokens of the longest single row that fits so many bytes, in steps of `STEP`; 0 if none does."""
        return STEP * _largest(lambda count: self.fits(memory, 1, STEP * count, limit), LONGEST // STEP)

    def most_rows(self, memory: Memory, length: int, limit: int) -> int:
        """Rows of that length in a micro-batch that fits."""
        return _largest(lambda count: self.fits(memory, count, length, limit), LONGEST // STEP)

    @property
    def rows(self) -> int:
        """Rows of a micro-batch of the plan."""
        return micro_batch(self.plan)

    @property
    def length(self) -> int:
        """Tokens of the longest row of the plan; a completion has a prompt before it."""
        assert self.plan.run.trainer is not None
        written = self.passes.written
        return max(self.plan.run.trainer.max_length, written + PROMPT if written else 0)

    def instead(self, **trainer: Any) -> Forecast:
        """The forecast with other settings of the trainer."""
        assert self.plan.run.trainer is not None
        run = replace(self.plan.run, trainer=replace(self.plan.run.trainer, **trainer))
        return replace(self, plan=replace(self.plan, run=run))


@contextmanager
def _as_they_were(layers: Sequence[Recomputing]) -> Iterator[None]:
    """What layers are told meanwhile is forgotten."""
    names = ("choose", "may_record", "away", "attended", "inside", "tiled")
    before = [[getattr(layer, name) for name in names] for layer in layers]
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            for name, value in zip(names, values, strict=True):
                setattr(layer, name, value)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all below one that fits do as well."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle <= most and fits(middle) else (low, middle)
    return low
