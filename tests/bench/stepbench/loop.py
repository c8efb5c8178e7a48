"""The bare training step, timed."""

from __future__ import annotations

import contextlib
import resource
import statistics
import time
from typing import Any

from stepbench.inputs import inputs
from stepbench.works import FREE, Work

GIB = 2**30


class Meter:
    """Seconds of each step, and the peaks of memory after warm-up."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._seconds: list[float] = []
        self._last = 0.0
        self._free: list[float] = []
        self._end = 0.0

    @property
    def free(self) -> bool:
        """Whether the steps that are waited for are over."""
        return len(self._seconds) == self._work.total

    def start(self) -> None:
        """Before a step: reset the peaks when warm-up is over, and wait for the GPU."""
        import torch

        if self.free:
            return
        if self._work.device == "cuda":
            torch.cuda.synchronize()
            if len(self._seconds) == self._work.warmup:
                torch.cuda.reset_peak_memory_stats()
        self._last = time.perf_counter()

    def stop(self) -> None:
        """After a step."""
        import torch

        last = len(self._free) == FREE - 1
        if self._work.device == "cuda" and (last or not self.free):
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.free:
            self._free.append(now)
        else:
            self._seconds.append(now - self._last)
            self._end = now

    def result(self, first_loss: float) -> dict[str, Any]:
        """What a side reports."""
        import torch

        seconds = statistics.median(self._seconds[self._work.warmup :])
        gpu = self._work.device == "cuda"
        return {
            "tokens_per_second": self._work.tokens / seconds,
            "step_ms": 1000 * seconds,
            **({"free_ms": 1000 * (self._free[-1] - self._end) / FREE} if len(self._free) == FREE else {}),
            "steps_ms": [round(1000 * s, 2) for s in self._seconds],
            "peak_gib": (torch.cuda.max_memory_allocated() + of_graphs()) / GIB if gpu else 0.0,
            "reserved_gib": torch.cuda.max_memory_reserved() / GIB if gpu else 0.0,
            "host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
            "first_loss": first_loss,
            "gpu": torch.cuda.get_device_name() if gpu else "CPU",
        }


def of_graphs() -> int:
    """Bytes that CUDA graphs hold although no tensor does: the peak of allocated memory leaves them out."""
    import torch

    pools = [part for part in torch.cuda.memory_snapshot() if tuple(part["segment_pool_id"]) != (0, 0)]
    return sum(part["total_size"] - part["allocated_size"] for part in pools)


def autocast(work: Work) -> Any:
    """bfloat16 autocast on a GPU, nothing on a CPU."""
    import torch

    return torch.autocast("cuda", torch.bfloat16) if work.device == "cuda" else contextlib.nullcontext()


def make_optimizer(work: Work, model: Any) -> Any:
    """Fused AdamW, or bitsandbytes' 8-bit AdamW; on a CPU PyTorch's in both cases."""
    import torch

    trained = [p for p in model.parameters() if p.requires_grad]
    if work.optimizer == "adamw8bit" and work.device == "cuda":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=1e-4)
    return torch.optim.AdamW(trained, lr=1e-4, fused=True)


def measure(work: Work, model: Any, free: bool = False, optimizer: Any = None) -> dict[str, Any]:
    """Median time of the steps after warm-up, and the first loss; with `profile`, one more step's kernels.

    :param free: Take the further steps that nobody waits for.
    :param optimizer: Instead of the one that the work names.
    """
    model.train()
    optimizer = optimizer or make_optimizer(work, model)
    batches = inputs(work, work.total + (FREE if free else 0))

    def step(batch: dict[str, Any]) -> Any:
        with autocast(work):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    meter, losses = Meter(work), []
    for batch in batches:
        meter.start()
        loss = step(batch)
        meter.stop()
        losses.append(loss)
    losses = [float(loss) for loss in losses[: work.total]]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {**meter.result(losses[0]), "losses": losses, "trained": trained}
    if work.profile:
        from stepbench.profiling import profiled

        result["profile"] = profiled(work, lambda: step(batches[-1]), result["step_ms"])
    return result
