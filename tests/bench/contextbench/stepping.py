"""Whole steps over one long row."""

from __future__ import annotations

from typing import Any

from stepbench.loop import GIB, Meter, autocast, make_optimizer
from stepbench.profiling import profiled
from stepbench.works import token_ids

from contextbench.works import ContextWork


def stepped(work: ContextWork, model: Any, optimizer: Any = None) -> dict[str, Any]:
    """Seconds and peaks of the steps after warm-up, and every step's loss and norm of the gradients.

    The warm-up leaves the optimizer its moments, so that the measured steps are as all later ones.
    """
    import torch

    model.train()
    optimizer = optimizer or make_optimizer(work, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meter, losses, norms = Meter(work), [], []

    def step(batch: Any) -> Any:
        with autocast(work):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None]))
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for number, ids in enumerate(token_ids(work)[: work.total]):
        warm = number < work.warmup and work.short
        batch = (ids[:, : work.short] if warm else ids).to(work.device)
        meter.start()
        loss = step(batch)
        meter.stop()
        losses.append(loss)
    found = meter.result(float(losses[0]))
    if work.profile:
        found["profile"] = profiled(work, lambda: step(batch), found["step_ms"])
        norms.pop()
    return {
        **found,
        "losses": [float(loss) for loss in losses],
        "gradients": [float(norm) for norm in norms],
        "trained": sum(parameter.numel() for parameter in trained),
        "outside_gib": outside() / GIB if work.device == "cuda" else 0.0,
    }


def outside() -> int:
    """Bytes of the GPU in use that are not this allocator's: CUDA's own, libraries', and other processes'."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())
