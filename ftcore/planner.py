"""How much each layer keeps for its backward pass: everything, if the memory is there, else what saves most work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ftcore.specs import Level, Recomputing

GIVEN_AWAY = 0.04
"""Part of the free memory that is left alone: the allocator's blocks are not all of one size."""


STAY = 3
"""Inputs of layers that are on the GPU although they wait in host memory: on their way, or not gone yet."""


class _Plan(NamedTuple):
    levels: list[int]
    """Of every layer."""
    record: bool
    """Whether launches may be recorded."""
    away: bool = False
    """Whether inputs wait in host memory."""
    tiled: bool = False
    """Whether layers work in tiles of rows."""


@dataclass
class Planner:
    """Chooses a level for every layer of a model, once for each shape of batch.

    The first plan is made before the optimizer has its state, the second once it has; then a shape keeps its plan.
    """

    layers: Sequence[Recomputing]
    budget: Callable[[int, int, int, bool, bool], int]
    """From rows, row length, the number of plans made before, whether launches are recorded, and whether layers work in
    tiles, to the bytes that activations may fill."""
    host: Callable[[], int] = lambda: 0
    """Bytes of host memory that inputs of layers may fill."""
    _plans: dict[tuple[int, int], list[_Plan]] = field(default_factory=dict)
    _now: _Plan = field(default_factory=lambda: _Plan([], False))

    def attach(self) -> None:
        """Make every layer ask this planner."""
        for index, layer in enumerate(self.layers):
            layer.choose = self._chooser(index)

    def _chooser(self, index: int) -> Callable[[int, int], int]:
        def choose(rows: int, length: int) -> int:
            if index == 0:
                self._now = self._plan(rows, length)
                for layer in self.layers:
                    layer.may_record, layer.away = self._now.record, self._now.away
                    layer.tiled = self._now.tiled
            return self._now.levels[index]

        return choose

    def _plan(self, rows: int, length: int) -> _Plan:
        plans = self._plans.setdefault((rows, length), [])
        # The first plan stands for two batches, so that gradients and optimizer state are there when memory is counted.
        if len(plans) == 1:
            plans.append(plans[0])
        elif len(plans) < 3:
            plans.append(self._made(rows, length, len(plans)))
        return plans[-1]

    def _made(self, rows: int, length: int, before: int) -> _Plan:
        levels = [layer.levels(rows, length) for layer in self.layers]
        everything = [len(of_layer) - 1 for of_layer in levels]
        whole = sum(of_layer[-1].kept for of_layer in levels)
        # Recorded launches keep memory of their own; where it is short, it is worth more for keeping.
        if whole <= self.budget(rows, length, before, True, False):
            return _Plan(everything, True)
        if whole <= self.budget(rows, length, before, False, False):
            return _Plan(everything, False)
        # Tiles cost next to nothing: before anything is computed again.
        free = self.budget(rows, length, before, False, True)
        away = 0 if whole <= free else self._moved(rows, length)
        return _Plan(assign(levels, free + away), False, away > 0, True)

    def _moved(self, rows: int, length: int) -> int:
        """Bytes of GPU memory that it frees to let inputs wait in host memory, if that has room for them."""
        moved = [layer.moved(rows, length) for layer in self.layers]
        if not all(moved) or sum(moved) > self.host():
            return 0
        return sum(moved[:-STAY])


def assign(levels: Sequence[Sequence[Level]], budget: int) -> list[int]:
    """The level of every layer: from the least on, whichever step saves most work for its bytes, while they last.

    Steps within a layer are taken along the convex hull of its levels. Among equal steps the last layer's is the
    first, because its backward comes first and gives the memory back.
    """
    chosen = [0] * len(levels)
    left = budget - sum(of_layer[0].kept for of_layer in levels)
    steps = sorted(
        ((-saved / max(more, 1), -layer, to, more) for layer, of_layer in enumerate(levels)
         for to, more, saved in _hull(of_layer)),
    )  # fmt: skip
    stuck: set[int] = set()
    for _, negative, to, more in steps:
        layer = -negative
        if layer in stuck:
            continue
        if more <= left:
            chosen[layer], left = to, left - more
        else:
            stuck.add(layer)  # a later step of this layer starts from the one that did not fit
    # What is left may still pay for a smaller step of a layer whose best one did not fit.
    for layer in range(len(levels) - 1, -1, -1):
        for to in range(len(levels[layer]) - 1, chosen[layer], -1):
            more = levels[layer][to].kept - levels[layer][chosen[layer]].kept
            if more <= left:
                chosen[layer], left = to, left - more
                break
    return chosen


def _hull(levels: Sequence[Level]) -> list[tuple[int, int, float]]:
    """Steps (to, more bytes, work saved) of falling worth from the first level to the last."""
    steps, at = [], 0
    while at < len(levels) - 1:
        gains = [
            ((levels[at].again - level.again) / max(level.kept - levels[at].kept, 1), to)
            for to, level in enumerate(levels)
            if to > at
        ]
        _, to = max(gains)
        steps.append((to, levels[to].kept - levels[at].kept, levels[at].again - levels[to].again))
        at = to
    return steps
