"""Which errors say that memory was short."""

from __future__ import annotations

import torch

from ftcore.host_memory import NoHostMemory

_HOST = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of a device or of the host."""
    return isinstance(error, torch.OutOfMemoryError | NoHostMemory) or any(text in str(error) for text in _HOST)
