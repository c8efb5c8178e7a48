"""Streams whose copies happen as late as they may: not before somebody waits for them.

On a GPU the copies begin long after they were asked for; a CPU has no streams, so there they are played: a copy waits
in a queue with the addresses it was given, and finds out then whether the memory is still there.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ftcore_kernels.layers.decoder.host import Host


class Stream:
    """Operations in a queue; the stream that computes does at once what it is told."""

    def __init__(self, at_once: bool = False) -> None:
        self.at_once = at_once
        self._queue: list[Callable[[], None]] = []
        self._done = 0

    def do(self, operation: Callable[[], None]) -> None:
        if self.at_once:
            operation()
        else:
            self._queue.append(operation)

    def record_event(self) -> Callable[[], None]:
        """An event is what makes its stream come so far."""
        number = len(self._queue)
        return lambda: self._come(number)

    def wait_event(self, event: Callable[[], None]) -> None:
        self.do(event)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def _come(self, number: int) -> None:
        while self._done < number:
            self._done += 1
            self._queue[self._done - 1]()


class Late:
    """In place of `torch.cuda`."""

    def __init__(self) -> None:
        self.computing = Stream(at_once=True)
        self._active = self.computing
        self.copies = 0

    def current_stream(self, device: Any) -> Stream:
        return self._active

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._active = self._active, stream
        try:
            yield
        finally:
            self._active = before

    def copy(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """`Tensor.copy_`."""

        def late(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            if self._active is self.computing:
                return own(to, source, non_blocking)
            assert to.dtype == source.dtype == torch.uint8
            assert to.is_contiguous()
            assert source.is_contiguous()
            self.copies += 1
            size, places = to.numel(), [(t.data_ptr(), StorageWeakRef(t.untyped_storage())) for t in (to, source)]
            self._active.do(lambda: _copied(size, *places))
            return to

        return late


def _copied(size: int, to: tuple[int, StorageWeakRef], source: tuple[int, StorageWeakRef]) -> None:
    if to[1].expired():
        return  # whoever gave it up will not miss it
    if source[1].expired():
        ctypes.memset(to[0], 0xFF, size)  # somebody else's by now: not a number
    else:
        ctypes.memmove(to[0], source[0], size)


def delay(host: Host, monkeypatch: Any) -> None:
    """Have every copy of that host be late."""
    if host.device.type == "cuda":
        copy = torch.Tensor.copy_

        def slow(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            torch.cuda._sleep(20_000_000)
            return copy(self, source, non_blocking)

        monkeypatch.setattr(torch.Tensor, "copy_", slow)
        return
    late: Any = Late()
    host.module, host.out, host.back = late, Stream(), Stream()  # type: ignore[assignment]
    monkeypatch.setattr(torch.Tensor, "copy_", late.copy(torch.Tensor.copy_))
