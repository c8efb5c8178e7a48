"""What tensors a piece of code makes: the largest one, and how many bytes are alive at once."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """While it is on, counts what operations return; what was there before is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        """Elements of the largest tensor."""
        self.peak = 0
        """Bytes of all that were alive at once."""
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._know(tensor)
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return out

    def _know(self, tensor: torch.Tensor) -> None:
        ref = StorageWeakRef(tensor.untyped_storage())  # while it is held, no other storage has its address
        if ref.cdata not in self._alive:
            self._before.setdefault(ref.cdata, ref)

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)
        if ref.cdata not in self._before and ref.cdata not in self._alive:
            self._alive[ref.cdata] = ref, storage.nbytes()
            self.largest = max(self.largest, tensor.numel())
