"""One run: a side, a seed, and its loss at every step."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Any

from curvebench.rows import batches

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Run:
    """What a process trains."""

    side: str
    """`hf` or `ftcore`."""
    seed: int
    """Decides the order of the rows, and A of the adapter."""
    dtype: str
    device: str
    steps: int
    size: int
    """Rows of a step."""
    rank: int = 16
    rate: float = 5e-4
    """Peak learning rate: linear over the first 20th of the steps, then linear to 0."""
    kernels: str = "auto"
    quantizer: str = ""
    """Of ftcore's base weights, such as `fp8`; plain Hugging Face keeps 16 bits."""


def trained(run: Run, data: dict[str, Any]) -> dict[str, Any]:
    """Losses, what the adapter was at the start, and with float16 how loss scaling went."""
    import torch

    model = (load_ftcore if run.side == "ftcore" else load_hf)(run, data["folder"]).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = checksum(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, run.steps))
    scaler = torch.amp.GradScaler(run.device, enabled=run.dtype == "float16")
    losses, skipped = [], 0
    for batch in batches(data["rows"], data["pad"], run.seed, run.steps, run.size):
        if run.side == "ftcore":
            # As ftcore's own trainer: no causal query sees the pads on its right, and kernels need no mask.
            del batch["attention_mask"]
        tensors = {name: torch.tensor(values, device=run.device) for name, values in batch.items()}
        with autocast(run):
            loss = model(**tensors).loss
        losses.append(loss.detach())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        optimizer.zero_grad()
        schedule.step()
    return {
        "losses": torch.stack(losses).float().tolist(),
        "adapter_at_start": start,
        "adapter_norm_at_end": float(torch.stack([p.detach().double().norm() for p in parameters]).norm()),
        "skipped_steps": int(skipped),
        "gpu": torch.cuda.get_device_name() if run.device == "cuda" else "CPU",
    }


def load_hf(run: Run, folder: str) -> Any:
    """transformers and PEFT, untouched."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    place = {"device_map": {"": 0}} if run.device == "cuda" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, run.dtype), **place)
    model.config.use_cache = False
    config = LoraConfig(task_type="CAUSAL_LM", r=run.rank, lora_alpha=2 * run.rank, target_modules=TARGETS)
    set_seed(run.seed)  # right before the adapter, as in ftcore's
    return get_peft_model(model, config)


def load_ftcore(run: Run, folder: str) -> Any:
    """ftcore's model with its kernels."""
    from ftcore import pipeline
    from ftcore.api import validated

    words = [
        "+model=smollm2",
        f"model.path={folder}",
        f"model.dtype={run.dtype}",
        f"adapter.r={run.rank}",
        f"adapter.alpha={2 * run.rank}",
        f"kernels=[{run.kernels}]",
        *([f"+quantizer={run.quantizer}"] if run.quantizer else []),
        "memory=off",
        "+trainer=sft",
        f"trainer.seed={run.seed}",
    ]
    hooks, plan = pipeline.prepare(validated(words))
    return pipeline.load(hooks, plan).model


def autocast(run: Run) -> Any:
    """Products in the run's dtype."""
    import torch

    if run.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(run.device, getattr(torch, run.dtype))


def factor(step: int, steps: int) -> float:
    """Part of the peak learning rate at a step."""
    warmup = max(1, steps // 20)
    return (step + 1) / warmup if step < warmup else (steps - step) / max(1, steps - warmup)


def checksum(parameters: list[Any]) -> str:
    """Of the trained tensors' bytes, whatever their order and names."""
    parts = sorted(
        hashlib.sha256(repr(tuple(p.shape)).encode() + p.detach().float().cpu().numpy().tobytes()).hexdigest()
        for p in parameters
    )
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
