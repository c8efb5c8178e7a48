"""Layer inputs in host memory between a forward and its backward, copied while the GPU computes.

A layer's input is sent before its forward; the memory on the GPU is let go when the layer after the next begins, when
the copy is certainly over. In the backward each layer asks for the input that is needed next, so that it arrives in
time. The inputs of the last two layers need not leave: they would still be there when the backward begins. Only events
order the streams: the host waits for nothing. What else a layer sends leaves and arrives with its input.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch

from ftcore_kernels.layers.decoder.pinned import Arena, Piece, Pinned

__all__ = ["IN_TRANSIT", "Away", "Host", "Pinned", "busy_host", "host_of"]

IN_TRANSIT = 1
"""Layers whose inputs stay on the GPU behind the latest one."""

WRITTEN_OVER = "a layer's input was written over between its forward and its backward"


class Host:
    """One device's streams, and its memory on the host, which is used again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.out, self.back = self.module.Stream(device), self.module.Stream(device)
        self.arena = Arena(device)
        self._latest: deque[weakref.ref[Away] | None] = deque()
        self._before: weakref.ref[Away] | None = None

    def send(self, tensor: torch.Tensor) -> Away:
        """Begin to copy a contiguous tensor, which nobody may write to before it has been taken back.

        Raises NoHostMemory where the host has no room for it.
        """
        self.layer()
        away = Away(self, tensor, self._before)
        away.leave()
        self._latest[-1] = self._before = weakref.ref(away)
        return away

    def keep(self, tensor: torch.Tensor) -> Away:
        """Have a tensor stay where it is, in the order of those that leave."""
        self.layer()
        away = Away(self, tensor, self._before)
        self._before = weakref.ref(away)
        return away

    def beside(self, tensor: torch.Tensor) -> Away:
        """Begin to copy another tensor of the layer whose input was the last, as :meth:`send` does."""
        first = None if self._before is None else self._before()
        assert first is not None, "a layer's input comes first"
        away = Away(self, tensor, None)
        away.leave()
        first.others.append(away)
        if self._latest:
            self._latest[-1] = self._before
        return away

    def layer(self) -> None:
        """A layer begins: one more since the inputs before it were sent."""
        self._latest.append(None)
        while len(self._latest) > 1 + IN_TRANSIT:
            first = self._latest.popleft()
            if (away := None if first is None else first()) is not None:
                away.settle()

    @property
    def busy(self) -> bool:
        """Whether tensors of the forward that is under way have been sent."""
        return self._before is not None and self._before() is not None

    def current(self) -> Any:
        """The stream that computes."""
        return self.module.current_stream(self.device)

    def over(self) -> None:
        """A backward has begun: what comes next is another forward's."""
        self._latest.clear()
        self._before = None

    @property
    def booked(self) -> int:
        """Bytes of host memory that are held, in use or not."""
        return self.arena.booked


class Away:
    """A tensor that is in host memory, or on its way to or from there."""

    def __init__(self, host: Host, tensor: torch.Tensor, before: weakref.ref[Away] | None) -> None:
        self.host, self.before = host, before
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._source: torch.Tensor | None = tensor
        self._version = tensor._version
        self._arriving: torch.Tensor | None = None
        self.others: list[Away] = []
        """What leaves and arrives with it."""
        self._pieces: list[Piece] = []
        self._copied: Any = None
        """Event of the last copy."""

    def leave(self) -> None:
        """Begin to copy it out."""
        assert self._source is not None
        host = self.host
        self._pieces = host.arena.take(self._source.numel() * self._source.element_size())
        host.out.wait_stream(host.current())
        host.out.wait_stream(host.back)  # what was there before may still be on its way back
        with host.module.stream(host.out):
            self._copy(self._source, out=True)
        self._copied = host.out.record_event()

    def _copy(self, tensor: torch.Tensor, out: bool) -> None:
        whole, start = tensor.view(-1).view(torch.uint8), 0
        for place in self.host.arena.views(self._pieces):
            part = whole[start : start + place.numel()]
            if out:
                place.copy_(part, non_blocking=True)
            else:
                part.copy_(place, non_blocking=True)
            start += place.numel()

    def settle(self) -> None:
        """Let go of the memory on the GPU: whoever uses it next does so after the copy."""
        for other in self.others:
            other.settle()
        if self._source is None or not self._pieces:
            return
        self._unchanged()
        self._wait(self.host.current())
        self._source = None

    def fetch(self) -> None:
        """Begin to copy it back, if it is not here, and the others of its layer."""
        self._come()
        for other in self.others:
            other._come()

    def _come(self) -> None:
        if self._source is not None or self._arriving is not None or not self._pieces:
            return
        self._arriving = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        host = self.host
        # After what the current stream still does with this memory, and after the copy out.
        host.back.wait_stream(host.current())
        self._wait(host.back)
        with host.module.stream(host.back):
            self._copy(self._arriving, out=False)
        self._copied = host.back.record_event()

    def take(self) -> torch.Tensor:
        """The tensor, for the current stream; the one that was sent before it begins to come back."""
        self.host.over()
        self.fetch()
        here = self._source
        if here is not None:
            self._unchanged()
        else:
            assert self._arriving is not None
            self._wait(self.host.current())
            here, self._arriving = self._arriving, None
        self._leave()
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return here

    def _wait(self, stream: Any) -> None:
        if self._copied is not None:  # a CPU has no events
            stream.wait_event(self._copied)

    def _unchanged(self) -> None:
        if self._source is not None and self._source._version != self._version:
            raise RuntimeError(WRITTEN_OVER)

    def _leave(self) -> None:
        pieces, self._pieces, self._source = self._pieces, [], None
        if pieces:
            self.host.arena.give(pieces)

    def __del__(self) -> None:
        if getattr(self, "_pieces", None):
            # A forward without a backward: its memory goes back to the allocator while a copy may still read or write.
            self._wait(self.host.current())
            self._leave()


_HOSTS: dict[torch.device, Host] = {}


def host_of(device: torch.device) -> Host:
    """The device's, made when it is first asked for."""
    if device not in _HOSTS:
        _HOSTS[device] = Host(device)
    return _HOSTS[device]


def busy_host(device: torch.device) -> Host | None:
    """The device's, if tensors of the forward that is under way have been sent there."""
    host = _HOSTS.get(device)
    return host if host is not None and host.busy else None
