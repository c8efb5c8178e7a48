"""Where the inputs of a model's layers are between their forwards and their backwards: two-level checkpointing.

An input is kept on the GPU, kept in host memory, or not at all: then it is made again from the input of a layer before
it, by those layers' forward. As few are made again as there is memory for. Where none is, and the host has room left,
what layers' attention gave waits there as well: of all that a backward would compute again, that takes longest in long
rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ftcore.specs import Recomputing

STAY = 2
"""Inputs that are on the GPU at least although the others wait in host memory: that of the layer at work, and one that
is on its way there or back."""


class Sizes(NamedTuple):
    """Bytes of what a layer leaves for its backward."""

    input: int
    beside: int = 0
    """What its least level keeps besides."""
    attended: int = 0
    """Attention's output, if it is worth a copy."""
    statistics: int = 0
    """What stays on the GPU where that has left."""


@dataclass(frozen=True)
class Store:
    """What becomes of every layer's input."""

    layers: int
    starts: tuple[int, ...]
    """Layers whose inputs are kept; each begins a segment, which ends before the next one."""
    away: int
    """How many of these wait in host memory: the first ones. The others stay on the GPU, which needs them first."""
    attended: int = 0
    """Layers whose attention's output waits in host memory: the first ones."""

    @classmethod
    @functools.lru_cache(maxsize=2**12)
    def of(cls, layers: int, kept: int, room: int) -> Store:
        """So many inputs kept, at most `room` of them in host memory, with as few on the GPU at once as can be."""
        for held in range(1, layers + 1):
            away = max(kept - held, 0)
            most = [held - beside for beside in _beside(kept, away)]
            if away <= room and min(most) > 0 and sum(most) >= layers:
                break
        starts, start = [], 0
        for length in _even(most, layers):
            starts.append(start)
            start += length
        return cls(layers, tuple(starts), away)

    @functools.cached_property
    def held(self) -> int:
        """Inputs that are on the GPU at once, at most."""
        kept = len(self.starts)
        lengths = (end - start for start, end in zip(self.starts, (*self.starts[1:], self.layers), strict=True))
        while_computed = [length + beside for length, beside in zip(lengths, _beside(kept, self.away), strict=True)]
        return max(*while_computed, kept - self.away, STAY if self.away else 0)

    @property
    def made_again(self) -> int:
        """Layers that compute their forward once more for the sake of a later layer's input."""
        return self.layers - len(self.starts)

    def gpu_bytes(self, sizes: Sizes) -> int:
        """Bytes of the GPU that the store takes at most: the last layer of each segment keeps something besides."""
        return self.held * sizes.input + len(self.starts) * sizes.beside + self.attended_bytes(sizes)

    def attended_bytes(self, sizes: Sizes) -> int:
        """Of these what there is for attention's outputs: one is on its way there or back."""
        return sizes.attended + self.attended * sizes.statistics if self.attended else 0

    def host_bytes(self, sizes: Sizes) -> int:
        """Bytes of host memory."""
        return self.away * sizes.input + self.attended * sizes.attended

    def attending(self, sizes: Sizes, gpu: int, host: int) -> Store:
        """The same with the outputs of as many layers' attention in host memory as so many bytes have room for.

        The last layer's backward comes next: what it may keep, it keeps on the GPU.
        """
        if self.made_again or not sizes.attended:
            return self
        room = gpu - self.gpu_bytes(sizes) - sizes.attended
        most = (host - self.host_bytes(sizes)) // sizes.attended, room // max(sizes.statistics, 1), self.layers - 1
        return replace(self, attended=max(min(most), 0))


def _beside(kept: int, away: int) -> list[int]:
    """Inputs that are on the GPU while a segment is computed again, besides the segment's own: for each segment.

    Those of segments before it that stay; where none does, that of the one before it is on its way.
    """
    staying = list(range(kept - away))
    if away and staying:
        staying[0] = 1
    return [1] * away + staying


def _even(most: Sequence[int], layers: int) -> list[int]:
    """So many layers in segments of about the same length, none longer than it may be."""
    lengths = [1] * len(most)
    left = layers - len(most)
    while left:
        for index, longest in enumerate(most):
            if left and lengths[index] < longest:
                lengths[index] += 1
                left -= 1
    return lengths


def stored(layers: Sequence[Recomputing], rows: int, length: int, gpu: int, host: int) -> Store:
    """The store that makes fewest inputs again of those that fit, or the smallest on the GPU if none does.

    :param gpu: Bytes of the GPU that it may take.
    :param host: Bytes of host memory; 0 leaves nothing there.
    """
    of_layer = sizes(layers, rows, length)
    number = len(layers)
    room = min(host // max(of_layer.input, 1), number)
    smallest = None
    for kept in range(number, 0, -1):
        store = Store.of(number, kept, room)
        taken = store.gpu_bytes(of_layer)
        if taken <= gpu:
            return store.attending(of_layer, gpu, host)
        if smallest is None or taken < smallest.gpu_bytes(of_layer):
            smallest = store
    assert smallest is not None
    return smallest


def sizes(layers: Sequence[Recomputing], rows: int, length: int) -> Sizes:
    """Of the largest layer."""
    size = max(layer.input_bytes(rows, length) for layer in layers)
    attended = [layer.attended_bytes(rows, length) for layer in layers]
    leaves = all(out for out, _ in attended)
    return Sizes(
        size,
        max(layer.levels(rows, length)[0].kept for layer in layers) - size,
        max(out for out, _ in attended) if leaves else 0,
        max(rest for _, rest in attended) if leaves else 0,
    )
