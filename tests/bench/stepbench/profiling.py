"""One step under torch.profiler: which kernels took the time, and how long the GPU had nothing to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from stepbench.works import Work

TOP = 80
DIGEST = 12


def profiled(work: Work, step: Callable[[], Any], step_ms: float) -> str:
    """The top kernels by their own time, after a line about busy and wall time."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gpu = work.device == "cuda"
    # Operators of the CPU are left out on a GPU: recording them slows the launches that are to be seen.
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as recorded:
        start = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        wall = 1000 * (time.perf_counter() - start)
    kind = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    # Annotations such as an optimizer's step span many kernels and the gaps between them.
    events = [e for e in recorded.events() if e.device_type == kind and not e.is_user_annotation]
    spans = [(e.time_range.start, e.time_range.end) for e in events]
    busy = busy_time(spans) / 1000
    rows = [
        ((e.self_device_time_total if gpu else e.self_cpu_time_total) / 1000, e.count, e.key)
        for e in recorded.key_averages()
        if not e.is_user_annotation
    ]
    rows = sorted((row for row in rows if row[0] > 0), reverse=True)
    total = sum(ms for ms, _, _ in rows)
    calls = sum(count for _, count, _ in rows)
    head = (
        f"busy {busy:.1f} ms of {wall:.1f} ms under the profiler ({100 * busy / wall:.0f} %), "
        f"{step_ms:.1f} ms without; {calls} kernels, {total:.1f} ms together"
    )
    return "\n".join([head, *(f"{ms:9.2f} ms  {count:6}  {name[:70]}" for ms, count, name in rows[:TOP])])


def busy_time(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels of two streams at once count once."""
    busy, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy


def digest(text: str) -> str:
    """The first lines."""
    return "\n".join(f"  {line}" for line in text.splitlines()[:DIGEST])
