"""Layers of which nothing is kept: their inputs are made again, from the nearest one before them that was kept.

A layer's function is a node of autograd's graph, and a tensor knows the node that it came from. So a layer follows
another one if its input is that one's very output; whoever does something to the hidden states between two layers
makes the second one keep its input.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ftcore_kernels.layers.decoder import steps
from ftcore_kernels.layers.decoder.host import WRITTEN_OVER
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.parts import Kept, Layer

ONCE = "this layer's backward writes over what it kept: it can run once per forward"


class Place(Protocol):
    """Where an input waits."""

    def take(self) -> torch.Tensor:
        """The input `[M, H]`, for the current stream; the place is left."""
        ...


class Here:
    """An input that stays where it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor: torch.Tensor | None = tensor
        self._version = tensor._version

    def take(self) -> torch.Tensor:
        """As the protocol."""
        tensor, self._tensor = self._tensor, None
        if tensor is None:
            raise RuntimeError(ONCE)
        if tensor._version != self._version:
            raise RuntimeError(WRITTEN_OVER)
        return tensor


class Member:
    """A layer between its forward and its backward: the first one of a segment, or one that follows another."""

    def __init__(self, layer: Layer, keep: Keep, kept: Kept, source: Place | Member) -> None:
        self._layer, self._keep = layer, keep
        kept.x = None  # it is where `source` says
        self._kept: Kept | None = kept
        self._source: Place | Member | None = source
        self._x: torch.Tensor | None = None
        self._followed = False

    def follow(self) -> bool:
        """Have a layer come after this one in its segment, if none does yet.

        Its output is computed again, and with it what this one kept besides its input.
        """
        if self._followed:
            return False
        self._followed = True
        if self._keep is Keep.INPUT:
            self._kept = None
        return True

    def end(self) -> None:
        """No layer may follow: somebody may write to the output behind autograd's back."""
        self._followed = True

    def taken(self) -> Kept:
        """What the backward needs, the input included; nothing of it stays here."""
        if self._kept is None:  # nobody asked for the output
            self._output()
        kept, self._kept = self._kept, None
        assert kept is not None
        kept.x, self._x, self._source = self._input(), None, None
        kept.arrive()
        return kept

    def _input(self) -> torch.Tensor:
        if self._x is None:
            source, self._source = self._source, None
            if source is None:
                raise RuntimeError(ONCE)
            self._x = source._output() if isinstance(source, Member) else source.take()
        return self._x

    def _output(self) -> torch.Tensor:
        """`[M, H]`, by the same steps as in the forward, so that it is the same to the last bit."""
        out, kept = steps.forward(self._layer, self._input(), self._keep)
        if self._kept is None:
            kept.reduce(self._keep, self._layer)
            kept.x, self._kept = None, kept
        return out
