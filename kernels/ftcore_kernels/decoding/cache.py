"""Keys and values of the tokens so far: for every layer a place for each row, as long as the longest may become.

Where a layer has a short convolution in place of attention, the last of its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ftcore_kernels.decoding.convolution import Tail

ALIGNED = 64
"""Tokens that a row's length is rounded up to."""


@dataclass(frozen=True)
class Shape:
    """Of one layer's keys."""

    heads: int
    dim: int

    def bytes_of(self, dtype: torch.dtype) -> int:
        """For the key and the value of one token."""
        return 2 * self.heads * self.dim * dtype.itemsize


class Cache:
    """`keys[layer]` and `values[layer]` are `[rows, Hkv, length, D]`; `tails[layer]` is `[rows, K - 1, H]`."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        rows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        tails: Sequence[Tail] = (),
    ) -> None:
        self.rows, self.length = rows, rounded(length)
        self.keys, self.values = (
            [torch.empty((rows, s.heads, self.length, s.dim), dtype=dtype, device=device) for s in shapes]
            for _ in range(2)
        )
        self.tails = [torch.zeros((rows, t.length, t.width), dtype=dtype, device=device) for t in tails]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> None:
        """Keep tokens' keys and values `[1, Hkv, T, D]` at their rows and places, int64 `[T]` each."""
        self.keys[layer][rows, :, places] = k[0].transpose(0, 1)
        self.values[layer][rows, :, places] = v[0].transpose(0, 1)

    @property
    def cuts(self) -> bool:
        """Whether a row may go on from any of its first tokens: a convolution keeps only its last inputs."""
        return not self.tails

    def first(self, layer: int, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[1, Hkv, length, D]` of a row's first tokens."""
        return self.keys[layer][row : row + 1, :, :length], self.values[layer][row : row + 1, :, :length]

    def lengthen(self, length: int, kept: int) -> None:
        """Make rows longer, one layer after the other; their first `kept` tokens stay."""
        self.length = rounded(length)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty((self.rows, old.shape[1], self.length, old.shape[3]))
                tensors[layer][:, :, :kept] = old[:, :, :kept]

    def copy(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first tokens of some rows to others, int64 `[N]` each."""
        for tensor in (*self.keys, *self.values):
            tensor[targets, :, :length] = tensor[sources, :, :length]
        for tail in self.tails:
            tail[targets] = tail[sources]


def rounded(length: int) -> int:
    """The length of a row of the cache."""
    return -(-length // ALIGNED) * ALIGNED


def row_bytes(shapes: Sequence[Shape], length: int, dtype: torch.dtype, tails: Sequence[Tail] = ()) -> int:
    """Bytes of one row in all layers."""
    keys = rounded(length) * sum(shape.bytes_of(dtype) for shape in shapes)
    return keys + sum(tail.bytes_of(dtype) for tail in tails)
