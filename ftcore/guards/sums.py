"""What waits for the next line of the log, kept in a checkpoint: without what is not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch

SUMS = ("_metrics", "_sums", "_stored_metrics", "_pending_metrics", "stats")
"""Where trainers add up what they log."""


@contextmanager
def finite_sums(trainer: Any) -> Iterator[None]:
    """Inside the block, sums with a number that is not finite begin with the next step; then they are as they were.

    The line of the log is null in this run, and of the steps after the checkpoint in one that goes on from it.
    """
    held = {name: vars(trainer)[name] for name in SUMS if name in vars(trainer) and not _finite(vars(trainer)[name])}
    empty = {name: _emptied(value) for name, value in held.items()}
    loss = getattr(trainer, "_tr_loss", None)
    if loss is not None and not _finite(loss):
        held |= {"_tr_loss": loss, "_globalstep_last_logged": trainer._globalstep_last_logged}
        empty |= {"_tr_loss": torch.zeros_like(loss), "_globalstep_last_logged": trainer.state.global_step}
    vars(trainer).update(empty)
    try:
        yield
    finally:
        vars(trainer).update(held)


def _finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if torch.is_tensor(value):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_finite, value))
    if is_dataclass(value):
        return all(_finite(getattr(value, field.name)) for field in fields(value))
    return True


def _emptied(value: Any) -> Any:
    """The same without what was added: no entries of lists, and dataclasses as they begin."""
    if isinstance(value, dict):
        made = copy.copy(value)
        for name, one in value.items():
            made[name] = _emptied(one)
        return made
    if isinstance(value, list):
        return []
    return type(value)() if is_dataclass(value) and not isinstance(value, type) else value
