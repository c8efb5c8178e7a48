"""What a trainer holds between two steps besides model, optimizer and random generators.

Metrics that wait for the next line of the log, the tokens seen so far, the place in streamed data, and, where one
rollout serves several steps, the rollout. Without them a run that goes on learns or logs something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ftcore.training_checkpoint import tree

NAME = "progress"
KEPT = (
    *("_tr_loss", "_globalstep_last_logged", "_total_train_tokens"),
    *("_metrics", "_stored_metrics", "_pending_metrics", "_sums", "stats"),
)
"""Attributes of transformers', TRL's and ftcore's trainers, those of them that a trainer has."""


def write(folder: Path, trainer: Any, names: Iterable[str]) -> None:
    """Write the attributes `names` of a trainer, and its place in data without a length."""
    held = {name: _plain(getattr(trainer, name)) for name in names if hasattr(trainer, name)}
    tree.write(folder, NAME, {"place": _place(trainer), "held": held})


def read(folder: Path, trainer: Any, names: Iterable[str]) -> None:
    """Give a trainer the attributes that `write` kept. A checkpoint from before there were any changes nothing."""
    if not (folder / f"{NAME}.json").is_file():
        return
    held = tree.read(folder, NAME)["held"]
    for name in names:
        if name in held:
            setattr(trainer, name, _like(getattr(trainer, name, None), held[name], trainer.args.device))
    # The losses that wait for the next line are of steps before this process: its own mean is without them.
    if "_tr_loss" in held:
        trainer._total_loss_scalar = -trainer._tr_loss.item()


def place_in_stream(folder: Path, trainer: Any) -> tuple[int, int] | None:
    """Passes over streamed data that are done, and batches of the one that is not; None for data with a length.

    transformers counts steps alone, and takes all of them for steps of the first pass.
    """
    if not (folder / f"{NAME}.json").is_file() or _has_length(trainer):
        return None
    place = tree.read(folder, NAME)["place"]
    return place and (place["passes"], place["rows"] // trainer.args.train_batch_size)


def _place(trainer: Any) -> dict[str, int] | None:
    if _has_length(trainer) or trainer.state.epoch is None:
        return None
    # transformers: epoch = passes + batches / (max_steps * accumulation), as if a pass had all the steps.
    length = trainer.state.max_steps * trainer.args.gradient_accumulation_steps
    passes = int(trainer.state.epoch)
    batches = round((trainer.state.epoch - passes) * length)
    if batches == 0:
        passes, batches = passes - 1, length
    return {"passes": passes, "rows": batches * trainer.args.train_batch_size}


def _has_length(trainer: Any) -> bool:
    return hasattr(trainer.train_dataset, "__len__")


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return value


def _like(old: Any, new: Any, device: Any) -> Any:
    """`new` in the place and of the kind of `old`: default dictionaries stay such, tensors are on the device."""
    import torch

    if isinstance(new, torch.Tensor):
        return new.to(device)
    if is_dataclass(old) and not isinstance(old, type):
        for name, inner in new.items():
            setattr(old, name, _like(getattr(old, name), inner, device))
        return old
    if isinstance(new, dict):
        whole = old if isinstance(old, dict) else {}
        for name, inner in new.items():
            whole[name] = _like(whole[name] if name in whole else _made(whole, name), inner, device)
        return whole
    if isinstance(new, list):
        return [_like(None, inner, device) for inner in new]
    return new


def _made(whole: dict[Any, Any], name: Any) -> Any:
    """What a default dictionary makes for a name that it does not have yet."""
    factory = getattr(whole, "default_factory", None)
    return factory() if factory is not None else None
