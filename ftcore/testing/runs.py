"""Plans, models and batches that the contracts are tried with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftcore.config import DEFAULTED, MANY

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from PIL.Image import Image
    from torch import nn

    from ftcore.errors import Problem
    from ftcore.manager import Hooks
    from ftcore.specs import Loaded, Plan

TINY = ("+model=llama", "model.tiny=true", "model.dtype=float32")
"""The model that plugins other than models are tried on."""
SHORT = ("trainer.global_batch=4", "trainer.max_length=160", "sampling.max_new_tokens=4")
"""Settings that keep a run short."""


def selecting(kind: str, name: str) -> str:
    """The override that selects an option: `+model=qwen3`, `+export=[adapter]`, `adapter=lora`."""
    plus = "" if kind in DEFAULTED else "+"
    return f"{plus}{kind}={f'[{name}]' if kind in MANY else name}"


def prepared(overrides: Sequence[str]) -> tuple[Hooks, Plan]:
    """The hooks and the checked plan of a run."""
    from ftcore import pipeline
    from ftcore.api import validated

    return pipeline.prepare(validated(list(overrides)))


def refusals(overrides: Sequence[str]) -> Sequence[Problem]:
    """What the plan of a run refuses."""
    from ftcore.errors import Refused

    try:
        prepared(overrides)
    except Refused as refused:
        return refused.problems
    return ()


def loaded(overrides: Sequence[str]) -> Loaded:
    """A model as a run would train it."""
    from ftcore import pipeline

    return pipeline.load(*prepared(overrides))


def reloaded(overrides: Sequence[str], run: str) -> Loaded:
    """What a run folder holds, loaded again as `run=FOLDER` does."""
    from dataclasses import replace

    from ftcore.api import validated
    from ftcore.tasks._trained import load_trained

    return load_trained(replace(validated(list(overrides)), run=run))


def batch_for(model: Any, length: int = 12) -> dict[str, torch.Tensor]:
    """Two rows of bytes; the second is shorter and padded, and the first words of both are not trained."""
    import torch

    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (2, length), generator=drawn)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labels = torch.where(mask == 1, ids, -100)
    labels[:, :3] = -100
    return {
        name: value.to(model.device)
        for name, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


def noise(width: int, height: int) -> Image:
    """A picture in which no two patches are the same, so that attention between them matters."""
    import torch
    from PIL.Image import fromarray

    drawn = torch.Generator().manual_seed(width * height)
    return fromarray(torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=drawn).numpy())


def row_with_images(*sizes: tuple[int, int], answer: str = "Noise.") -> dict[str, Any]:
    """A row of shape `images`: pictures of so many pixels (width, height), a question about them, and an answer."""
    asked = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "What is this?"}]
    said = [{"type": "text", "text": answer}]
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"images": [noise(*size) for size in sizes], "messages": messages}


def batch_with_images(overrides: Sequence[str]) -> dict[str, torch.Tensor]:
    """Two rows with pictures of different sizes, as the SFT trainer gets them; the second is shorter and padded."""
    from ftcore import hooks as h
    from ftcore.vision import ImageRowTokenizer

    hooks, plan = prepared([*overrides, "data=images", "+trainer=sft"])
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    tokenize = ImageRowTokenizer(tokenizer, plan.family.vision, 1000)
    rows = [row_with_images((64, 96), answer="Noise, and nothing but noise."), row_with_images((60, 40))]
    batch: dict[str, torch.Tensor] = hooks.first(h.ftcore_make_collator, plan=plan, tokenizer=tokenizer)(
        [made for row in rows for made in tokenize(row)]
    )
    return batch


def document(length: int) -> dict[str, torch.Tensor]:
    """One row `[1, length]` of bytes without padding; its first third is not trained."""
    import torch

    ids = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(length))
    labels = ids.clone()
    labels[:, : max(length // 3, 1)] = -100
    return {"input_ids": ids, "labels": labels}


def packed(documents: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The documents in one row, told apart by their positions, as packing collators do it."""
    import torch

    row = {name: torch.cat([one[name] for one in documents], dim=1) for name in ("input_ids", "labels")}
    positions = [torch.arange(one["input_ids"].shape[1]) for one in documents]
    return row | {"position_ids": torch.cat(positions).unsqueeze(0)}


def shake(model: nn.Module, trainable_only: bool = False) -> None:
    """Move every weight off its start: norms of exactly 1 and adapters of exactly 0 would hide mistakes."""
    import torch

    drawn = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (parameter.requires_grad or not trainable_only):
                noise = torch.randn(parameter.shape, generator=drawn) * 0.05
                parameter.add_(noise.to(parameter.device, parameter.dtype))


def logits_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits in evaluation mode, of the tokens that are not padding where there is a mask, in float32 on the CPU."""
    import torch

    from ftcore.answers import evaluating

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with evaluating(model), torch.no_grad():
        logits: torch.Tensor = model(**inputs).logits
    return (logits[batch["attention_mask"] == 1] if "attention_mask" in batch else logits).float().cpu()
