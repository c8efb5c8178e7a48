"""Layer inputs in host memory between a forward and its backward, copied while the GPU computes.

A layer's input is sent as its forward begins; the memory on the GPU is let go two layers later, when the copy is
certainly over. In the backward each layer asks for the input of the layer before it, so that it arrives in time. The
last two inputs never left the GPU when the backward begins. Only events order the streams: the host waits for nothing.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from typing import Any

import torch

IN_TRANSIT = 2
"""Inputs that stay on the GPU behind the latest one."""


class Pinned:
    """Host memory that a GPU copies from and to by itself: exactly as many bytes as asked for."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8)
        self.free_after: Any = None
        """Event of the last copy."""
        # torch's own pinned memory comes in powers of two.
        self._cudart = torch.cuda.cudart() if device.type == "cuda" and size else None
        if self._cudart is not None and int(self._cudart.cudaHostRegister(self.bytes.data_ptr(), size, 0)) != 0:
            self._cudart = None  # no more memory may be locked: copies are right, but the host waits for them

    def __del__(self) -> None:
        if getattr(self, "_cudart", None) is not None:
            self._cudart.cudaHostUnregister(self.bytes.data_ptr())


class Host:
    """One device's streams, and its pinned memory, which is used again."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.out, self.back = self.module.Stream(device), self.module.Stream(device)
        self._free: dict[int, list[Pinned]] = {}
        self._latest: deque[Away] = deque()

    def send(self, tensor: torch.Tensor) -> Away:
        """Begin to copy a contiguous tensor, which nobody may write to before it has been taken back."""
        if len(self._latest) > IN_TRANSIT:
            self._latest.popleft().settle()
        away = Away(self, tensor, self._latest[-1] if self._latest else None)
        self._latest.append(away)
        return away

    def current(self) -> Any:
        """The stream that computes."""
        return self.module.current_stream(self.device)

    def over(self) -> None:
        """A backward has begun: what comes next is another forward's."""
        self._latest.clear()

    def slot(self, size: int) -> Pinned:
        """Memory of that many bytes."""
        free = self._free.setdefault(size, [])
        return free.pop() if free else Pinned(size, self.device)

    def give(self, slot: Pinned) -> None:
        """Memory that is free again, after its last copy."""
        self._free[slot.bytes.numel()].append(slot)

    @property
    def booked(self) -> int:
        """Bytes of host memory that wait to be used again."""
        return sum(size * len(slots) for size, slots in self._free.items())


class Away:
    """A tensor that is in host memory, or on its way to or from there."""

    def __init__(self, host: Host, tensor: torch.Tensor, before: Away | None) -> None:
        self.host, self.before = host, None if before is None else weakref.ref(before)
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._source: torch.Tensor | None = tensor
        self._version = tensor._version
        self._arriving: torch.Tensor | None = None
        self._slot: Pinned | None = host.slot(tensor.numel() * tensor.element_size())
        host.out.wait_stream(host.current())
        if self._slot.free_after is not None:
            host.out.wait_event(self._slot.free_after)
        with host.module.stream(host.out):
            self._bytes(self._slot).copy_(tensor, non_blocking=True)
        self._slot.free_after = host.out.record_event()

    def _bytes(self, slot: Pinned) -> torch.Tensor:
        return slot.bytes.view(self._dtype).view(self._shape)

    def settle(self) -> None:
        """Let go of the memory on the GPU: whoever uses it next does so after the copy."""
        if self._source is None or self._slot is None:
            return
        self._unchanged()
        if self._slot.free_after is not None:
            self.host.current().wait_event(self._slot.free_after)
        self._source = None

    def fetch(self) -> None:
        """Begin to copy it back, if it is not here."""
        if self._source is not None or self._arriving is not None or self._slot is None:
            return
        self._arriving = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        # After what the current stream still does with this memory, and after the copy out.
        self.host.back.wait_stream(self.host.current())
        if self._slot.free_after is not None:
            self.host.back.wait_event(self._slot.free_after)
        with self.host.module.stream(self.host.back):
            self._arriving.copy_(self._bytes(self._slot), non_blocking=True)
        self._slot.free_after = self.host.back.record_event()

    def take(self) -> torch.Tensor:
        """The tensor, for the current stream; the one that was sent before it begins to come back."""
        self.host.over()
        self.fetch()
        here = self._source
        if here is not None:
            self._unchanged()
        else:
            assert self._arriving is not None and self._slot is not None
            if self._slot.free_after is not None:
                self.host.current().wait_event(self._slot.free_after)
            here, self._arriving = self._arriving, None
        self._leave()
        before = None if self.before is None else self.before()
        if before is not None:
            before.fetch()
        return here

    def _unchanged(self) -> None:
        if self._source is not None and self._source._version != self._version:
            raise RuntimeError("a layer's input was written over between its forward and its backward")

    def _leave(self) -> None:
        slot, self._slot, self._source = self._slot, None, None
        if slot is not None:
            self.host.give(slot)

    def __del__(self) -> None:
        if getattr(self, "_slot", None) is not None:
            if self._source is not None and self._slot is not None and self._slot.free_after is not None:
                # A forward without a backward: its memory goes back to the allocator while the copy may still read.
                self.host.current().wait_event(self._slot.free_after)
            self._leave()


@functools.cache
def host_of(device: torch.device) -> Host:
    """The device's, made when it is first asked for."""
    return Host(device)
