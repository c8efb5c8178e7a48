"""How much each layer keeps for its backward pass: everything, if the memory is there, else what saves most work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ftcore.specs import Level, Recomputing
from ftcore.store import STAY, Sizes, Store, sizes, stored

__all__ = ["GIVEN_AWAY", "STAY", "Lean", "Planner", "assign"]

GIVEN_AWAY = 0.04
"""Part of the free memory that is left alone: the allocator's blocks are not all of one size."""
POOL = 0.05
"""Part of what recorded layers keep that their memory takes besides, because its blocks are not all of one size."""


def for_recorded(left: int, layers: Sequence[Recomputing], rows: int, length: int) -> int:
    """Bytes that may be kept of so many in the memory of recorded launches; all of them where no launch is recorded."""
    return int(left / (1 + POOL)) if any(layer.recorded > rows * length for layer in layers) else left


class _Plan(NamedTuple):
    levels: list[int]
    """Of every layer."""
    record: bool
    """Whether launches may be recorded."""
    tiled: bool = False
    """Whether layers work in tiles of rows."""
    store: Store | None = None
    """What becomes of the layers' inputs; None keeps all of them on the GPU."""


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
    say: Callable[[int, int, Store], None] = lambda rows, length, store: None
    """Told of every new store in which inputs are made again."""
    _plans: dict[tuple[int, int], list[_Plan]] = field(default_factory=dict)
    _now: _Plan = field(default_factory=lambda: _Plan([], False))
    _said: set[Store] = field(default_factory=set)

    def attach(self) -> None:
        """Make every layer ask this planner."""
        for index, layer in enumerate(self.layers):
            layer.choose = self._chooser(index)

    @property
    def store(self) -> Store | None:
        """Where the inputs are of the batch that was planned last; None keeps all of them on the GPU."""
        return self._now.store

    def _chooser(self, index: int) -> Callable[[int, int], int]:
        def choose(rows: int, length: int) -> int:
            if index == 0:
                self._now = self._plan(rows, length)
                self._tell()
            return self._now.levels[index]

        return choose

    def _tell(self) -> None:
        plan, store = self._now, self._now.store
        for layer in self.layers:
            layer.may_record, layer.tiled = plan.record, plan.tiled
            layer.away = layer.inside = layer.attended = False
        if store is not None:
            for layer in self.layers:
                layer.inside = True
            for place, start in enumerate(store.starts):
                self.layers[start].inside, self.layers[start].away = False, place < store.away
            for index, layer in enumerate(self.layers[: store.attended]):
                layer.attended = plan.levels[index] == 0

    def _plan(self, rows: int, length: int) -> _Plan:
        plans = self._plans.setdefault((rows, length), [])
        # The first plan stands for two batches, so that gradients and optimizer state are there when memory is counted.
        if len(plans) == 1:
            plans.append(plans[0])
        elif len(plans) < 3:
            plans.append(self._made(rows, length, len(plans)))
            store = plans[-1].store
            if store is not None and store.made_again and store not in self._said:
                self._said.add(store)
                self.say(rows, length, store)
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
        if sum(of_layer[0].kept for of_layer in levels) > free + away:
            return _least(self.layers, rows, length, free, self.host())
        chosen, store = assign(levels, free + away), None
        if away:
            number = len(self.layers)
            store = Store.of(number, number, number)
            chosen, store = self._attending(levels, free + away, chosen, store, sizes(self.layers, rows, length))
        return _Plan(chosen, False, True, store)

    def _attending(
        self, levels: Sequence[Sequence[Level]], budget: int, chosen: list[int], store: Store, of_layer: Sizes
    ) -> tuple[list[int], Store]:
        """The levels, or fewer bytes on the GPU with what attention gave in host memory, if that saves more work."""
        left = budget - of_layer.attended - len(levels) * of_layer.statistics
        if not of_layer.attended or sum(of_one[0].kept for of_one in levels) > left:
            return chosen, store
        others = assign(levels, left)
        least = next((index for index, level in enumerate(others) if level), len(others) - 1)
        room = max(self.host() - store.host_bytes(of_layer), 0) // of_layer.attended
        attended = replace(store, attended=min(least, room))
        with_them = [max(level, int(index < attended.attended)) for index, level in enumerate(others)]
        return (others, attended) if _again(levels, with_them) < _again(levels, chosen) else (chosen, store)

    def _moved(self, rows: int, length: int) -> int:
        """Bytes of GPU memory that it frees to let inputs wait in host memory, if that has room for them."""
        moved = [layer.moved(rows, length) for layer in self.layers]
        bytes_away = sum(moved[:-STAY])
        return bytes_away if all(moved) and bytes_away <= self.host() else 0


@dataclass
class Lean(Planner):
    """Has every layer keep its input only, if that, and work in tiles of rows."""

    last: Callable[[int, int], int] = lambda rows, length: 0
    """The last layer's level: what it may keep besides at no cost."""

    def attach(self) -> None:
        """As the planner's; before the first batch nothing is recorded either."""
        super().attach()
        self._now = _Plan([0] * len(self.layers), False, True)
        self._tell()

    def _made(self, rows: int, length: int, before: int) -> _Plan:
        free = self.budget(rows, length, before, False, True)
        plan = _least(self.layers, rows, length, free, self.host())
        plan.levels[-1] = self.last(rows, length)
        return plan


def _least(layers: Sequence[Recomputing], rows: int, length: int, gpu: int, host: int) -> _Plan:
    """Every layer keeps its input only, or nothing where not all inputs fit so many bytes."""
    store = stored(layers, rows, length, gpu, host)
    return _Plan([0] * len(layers), False, True, store if store.away or store.made_again else None)


def _again(levels: Sequence[Sequence[Level]], chosen: Sequence[int]) -> float:
    return sum(of_layer[level].again for of_layer, level in zip(levels, chosen, strict=True))


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
