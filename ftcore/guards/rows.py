"""Which rows a micro-batch is made of, as the sampler drew them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator
from typing import Any


class Drawn:
    """A sampler that remembers what it drew in this epoch; everything else is the given one's."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.order = array("q")
        self.fresh = True
        """Whether nothing was taken of this epoch yet."""

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self.order = array("q")
        self.fresh = True
        for row in self._sampler:
            self.order.append(row)
            yield row

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy asks before there is a sampler
            raise AttributeError(name)
        return getattr(self._sampler, name)


class Rows:
    """The rows of the micro-batches of a loader, which is transformers' or accelerate's."""

    def __init__(self, loader: Any, process: int = 0, processes: int = 1) -> None:
        self._loader, self._process, self._processes = loader, process, processes
        self._place = 0
        self._drawn, self._size = _watched(getattr(loader, "batch_sampler", None))

    def take(self, micro_batches: int, step: int, accumulation: int) -> list[list[int]] | None:
        """Rows of the next micro-batches, by their number in the trainer's data set; None for a stream.

        :param step: Optimizer steps before this one, by which a run that goes on finds its place in the epoch.
        """
        if self._drawn is None:
            return None
        if self._drawn.fresh:
            self._drawn.fresh = False
            per_epoch = max(math.ceil(len(self._loader) / accumulation), 1)
            self._place = step % per_epoch * accumulation
        first, self._place = self._place, self._place + micro_batches
        places = [number * self._processes + self._process for number in range(first, self._place)]
        return [list(self._drawn.order[place * self._size :][: self._size]) for place in places]

    def batch(self, rows: list[int]) -> Any:
        """A batch of these rows, as the loader makes them."""
        dataset: Any = self._loader.dataset
        collate: Callable[[list[Any]], Any] = self._loader.collate_fn
        return collate([dataset[row] for row in rows])


def _watched(batches: Any) -> tuple[Drawn | None, int]:
    """The sampler of single rows below a sampler of batches, watched from now on, and the size of a batch."""
    while hasattr(batches, "batch_sampler"):  # accelerate's, which share batches out, or leave the first ones out
        batches = batches.batch_sampler
    sampler, size = getattr(batches, "sampler", None), getattr(batches, "batch_size", None)
    if not isinstance(size, int) or not hasattr(sampler, "__len__"):  # a stream's draws nothing
        return None, 0
    if not isinstance(sampler, Drawn):
        batches.sampler = sampler = Drawn(sampler)
    return sampler, size
