"""Memory that CUDA graphs share."""

from __future__ import annotations

import weakref
from typing import Any

import torch


class Pool:
    """A pool of the allocator, for as long as one of its graphs is there; after that another one.

    The allocator takes no new graph into a pool whose graphs are all gone while somebody still holds a part of its
    memory: it ends in an assertion of its own.
    """

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        self._handle: Any = None

    def handle(self, graph: torch.cuda.CUDAGraph) -> Any:
        """What `graph`, which is counted from now on, is to be recorded with."""
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        self._graphs.add(graph)
        return self._handle
