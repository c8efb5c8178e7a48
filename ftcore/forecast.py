"""What a run will take of a GPU's memory, said from the plan alone: no weights are read, and no GPU is needed.

Counted are the weights, the gradients and moments of what is trained, what the layers keep for their backward, and the
largest work that is done for a while, by the very numbers that `memory=auto` decides by. Libraries' own memory and what
the allocator rounds up are not known here: `free` leaves room for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ftcore.catalog import installed
from ftcore.config import Graphs, Memory
from ftcore.memory import head_bytes, layers_that_choose, optimizer_bytes
from ftcore.planner import GIVEN_AWAY, STAY
from ftcore.specs import Plan, Recomputing

BITS = "bits_per_weight"
"""Function of a quantizer's module: from its config to the bits that a frozen weight takes, scales included."""
CONTEXT = 2**29
"""Bytes left for what CUDA and the libraries take for themselves: an allowance, not a measurement."""
STEP = 256
"""Tokens that a row's length is found to."""
LONGEST = 2**23
"""Tokens of a row that nobody looks beyond."""


def free(gibibytes: float) -> int:
    """Bytes of a GPU of that size which a run may plan with."""
    return max(0, int(gibibytes * 2**30 * (1 - GIVEN_AWAY)) - CONTEXT)


@dataclass(frozen=True)
class Forecast:
    """Of a run whose model, adapter and kernels are there without weights."""

    plan: Plan
    model: Any
    layers: Sequence[Recomputing]

    @classmethod
    def of(cls, plan: Plan, model: Any) -> Forecast | str:
        """Or why there is none: what is not counted."""
        trainer, layers = plan.trainer, layers_that_choose(model)
        if trainer is None or not trainer.tokenized or trainer.teacher:
            return "counted are trainers of one sequence a row and one model"
        if plan.family.vision is not None:
            return "what images take is not counted"
        if len(layers) != model.config.get_text_config().num_hidden_layers:
            return "layers of this run are transformers' own, and nobody has counted what those keep"
        if plan.run.graphs is Graphs.auto:
            for before, layer in zip([None, *layers], layers, strict=False):
                layer.follow(before)
        return cls(plan, model, layers)

    @cached_property
    def fixed(self) -> int:
        """Bytes of weights, gradients and the optimizer's moments, in 16-bit training on a GPU."""
        quantizer, wide = self.plan.run.quantizer, 4 if self._in_32_bits else 2
        bits = 8 * wide
        if quantizer is not None:
            of_weight = getattr(installed().find("quantizer", quantizer.name).load(), BITS, None)
            bits = of_weight(quantizer) if of_weight else bits
        inside = {
            id(parameter)
            for module in self.model.modules()
            if hasattr(module, "ftcore_recompute")
            for parameter in module.parameters()
            if parameter.ndim == 2
        }
        # An adapter's matrices are in 32 bits; weights that are trained themselves are as the model is.
        of_trained = 4 if hasattr(self.model, "peft_config") else wide
        total = 0.0
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                total += parameter.numel() * (2 * of_trained + optimizer_bytes(self.plan))
            else:
                total += parameter.numel() * (bits / 8 if id(parameter) in inside else wide)
        return int(total)

    @property
    def _in_32_bits(self) -> bool:
        assert self.plan.run.model is not None
        return self.plan.run.model.dtype == "float32"

    def peak(self, memory: Memory, rows: int, length: int) -> int:
        """Bytes of the GPU at the most, for a micro-batch of that many rows of so many tokens.

        `auto` is as `off` here, which it is wherever that fits.
        """
        levels = [layer.levels(rows, length) for layer in self.layers]
        whole = memory in (Memory.off, Memory.auto)
        kept = sum(of_layer[-1 if whole else 0].kept for of_layer in levels)
        if memory is Memory.offload:
            kept = sum(of_layer[0].kept for of_layer in levels[-STAY:])
        work = max(layer.workspace(rows, length, not whole) for layer in self.layers)
        head = head_bytes(self.model, rows, length)
        recorded = whole and any(layer.recorded > rows * length for layer in self.layers)
        # Recorded launches have memory of their own, which the head does not share.
        return self.fixed + kept + (work + head if recorded else max(work, head))

    def host(self, rows: int, length: int) -> int:
        """Bytes of host memory that `offload` takes for the layers' inputs."""
        return sum(layer.levels(rows, length)[0].kept for layer in self.layers)

    def longest(self, memory: Memory, limit: int) -> int:
        """Tokens of the longest single row that fits so many bytes, in steps of `STEP`; 0 if none does."""
        return STEP * _largest(lambda count: self.peak(memory, 1, STEP * count) <= limit, LONGEST // STEP)

    def most_rows(self, memory: Memory, length: int, limit: int) -> int:
        """Rows of that length in a micro-batch that fits."""
        return _largest(lambda count: self.peak(memory, count, length) <= limit, LONGEST // STEP)


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` that fits, where all below one that fits do as well."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle <= most and fits(middle) else (low, middle)
    return low
