"""The clock and the memory of a side's completions."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from rollbench.works import RollWork

Write = Callable[[Sequence[int]], list[list[int]]]
"""Completions of the rows in these places."""


def timed(work: RollWork, write: Write, rows: Sequence[int], warm: Sequence[int]) -> dict[str, Any]:
    """Once for warming up, and once by the clock. Raises SystemExit unless all tokens are there."""
    import torch

    gpu = work.device == "cuda"
    weights = torch.cuda.memory_allocated() if gpu else 0
    start = time.perf_counter()
    write(warm)
    warmed = time.perf_counter() - start
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    found = write(rows)
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    wanted = work.lengths()
    if [len(ids) for ids in found] != [wanted[row] for row in rows]:
        raise SystemExit(f"completions have {[len(ids) for ids in found][:8]} tokens")
    tokens = sum(map(len, found))
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "warm_seconds": warmed,
        "weights_gib": weights / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if gpu else 0.0,
        "first_tokens": found[0][:8],
        "digest": hashlib.sha256(repr(found).encode()).hexdigest()[:12],
        "gpu": torch.cuda.get_device_name() if gpu else "CPU",
    }


def shaken(model: Any) -> None:
    """LoRA's B is zero at the start: give every adapter something to do, its A too, the same on all sides."""
    import torch

    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            drawn = torch.Generator().manual_seed(len(name) * 1009 + sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=drawn) * 0.02
            parameter.data.copy_(noise.to(parameter.device, parameter.dtype))
