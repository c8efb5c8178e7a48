"""Host memory that a GPU copies from and to by itself: exactly as much as was ever needed at once, and used again.

torch's own pinned memory comes in powers of two, and keeps every size that was ever asked for.
"""

from __future__ import annotations

import functools
import mmap
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from ftcore.host_memory import need
from ftcore.report import note

PRIVATE: dict[str, int] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # Windows has neither
)
GROWTH = 256
"""More is booked by this part of what there is at least, so that rows that grow by a token do not end in crumbs."""


class Pinned:
    """So many bytes, locked if they may be. Raises NoHostMemory where they are not there."""

    def __init__(self, size: int, device: torch.device) -> None:
        need(size)
        # Pages of its own: they go back to the system, and nobody else's are locked with them.
        self._pages = mmap.mmap(-1, max(size, 1), **PRIVATE)
        if hasattr(mmap, "MADV_DONTFORK"):
            self._pages.madvise(mmap.MADV_DONTFORK)  # a forked loader of data has no use for them
        self.bytes = torch.frombuffer(self._pages, dtype=torch.uint8)[:size]
        self._cudart: Any = None
        self._device = device
        if device.type == "cuda" and size:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    self._pages.madvise(mmap.MADV_HUGEPAGE)
            self.bytes.zero_()  # all threads get the pages from the system, where locking them would be one alone
            cudart: Any = torch.cuda.cudart()
            error = int(cudart.cudaHostRegister(self.bytes.data_ptr(), size, 0))
            if error == 0:
                self._cudart = cudart
            else:
                _forget_error(device)
                say_unlocked(error)

    @property
    def locked(self) -> bool:
        """Whether a GPU copies it by itself; otherwise the copies are right, but the host waits for them."""
        return self._cudart is not None

    def __del__(self) -> None:
        if getattr(self, "_cudart", None) is not None:
            with suppress(RuntimeError):  # a device that failed has nothing under way
                torch.cuda.synchronize(self._device)  # kernels and copies may still read it
            self._cudart.cudaHostUnregister(self.bytes.data_ptr())


def _forget_error(device: torch.device) -> None:
    """CUDA hands the error of a failed call to whoever asks next: that is here."""
    try:
        torch.ones(1, device=device)  # a launch
    except RuntimeError:
        return


@functools.cache
def say_unlocked(error: int) -> None:
    """Once for each reason."""
    note(
        f"host memory cannot be locked for the GPU (CUDA error {error}; {_limit()}): the inputs of layers wait in "
        "ordinary memory, the host waits for their copies, and they take two to four times as long; results are the "
        "same\n    fix: raise the limit of locked memory (`ulimit -l unlimited`; docker: --ulimit memlock=-1)"
    )


def _limit() -> str:
    try:
        import resource
    except ImportError:  # Windows
        return "the system allows no more"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "the limit of locked memory is " + ("off" if limit < 0 else f"{limit >> 10} KiB")


class Piece(NamedTuple):
    """Bytes of a block."""

    block: int
    start: int
    end: int


class Arena:
    """Host memory for one device, handed out in pieces of blocks.

    A request takes what is free, wherever that is, and a new block of what is missing: what is booked is what was
    needed at once, to one part in `GROWTH`, whatever the sizes.
    """

    def __init__(self, device: torch.device, make: Callable[[int, torch.device], Pinned] = Pinned) -> None:
        self._device, self._make = device, make
        self._blocks: list[Pinned] = []
        self._free: list[Piece] = []
        """In order, and no two of them adjoin."""
        self._returned: deque[Piece] = deque()
        """Given back, and not among them yet."""

    @property
    def booked(self) -> int:
        """Bytes of all blocks."""
        return sum(block.bytes.numel() for block in self._blocks)

    @property
    def free(self) -> int:
        """Bytes that wait to be used again."""
        self._merge()
        return sum(piece.end - piece.start for piece in self._free)

    def take(self, size: int) -> list[Piece]:
        """Pieces of so many bytes together. Raises NoHostMemory."""
        missing = size - self.free
        if missing > 0:
            more = max(missing, self.booked // GROWTH)
            self._blocks.append(self._make(more, self._device))
            self._free.append(Piece(len(self._blocks) - 1, 0, more))
        taken = []
        while size:
            block, start, end = self._free.pop(0)
            if end - start > size:
                self._free.insert(0, Piece(block, start + size, end))
                end = start + size
            taken.append(Piece(block, start, end))
            size -= end - start
        return taken

    def give(self, pieces: list[Piece]) -> None:
        """Take them back. A collection of garbage may do this at any moment, in any thread: it only notes them."""
        self._returned.extend(pieces)

    def _merge(self) -> None:
        pieces = [self._returned.popleft() for _ in range(len(self._returned))]
        merged: list[Piece] = []
        for piece in sorted([*self._free, *pieces]):
            last = merged[-1] if merged else None
            if last is not None and last.block == piece.block and last.end == piece.start:
                merged[-1] = Piece(piece.block, last.start, piece.end)
            else:
                merged.append(piece)
        self._free = merged

    def views(self, pieces: list[Piece]) -> list[torch.Tensor]:
        """The bytes of each piece."""
        return [self._blocks[block].bytes[start:end] for block, start, end in pieces]
