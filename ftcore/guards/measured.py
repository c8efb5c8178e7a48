"""What trainers gather from pass to pass, for a step that is done again to begin with what was there before it."""

from __future__ import annotations

import copy
from typing import Any

NAMES = ("_metrics", "_stored_metrics", "_total_train_tokens", "_sums")
"""Attributes of TRL's trainers, and of ftcore's on them."""


def noted(trainer: Any) -> dict[str, Any]:
    """Copies of all that a trainer has gathered."""
    return {name: _copied(vars(trainer)[name]) for name in NAMES if name in vars(trainer)}


def put_back(trainer: Any, found: dict[str, Any]) -> None:
    """Make what a trainer has gathered what `noted` found."""
    vars(trainer).update({name: _copied(value) for name, value in found.items()})


def _copied(value: Any) -> Any:
    made = copy.copy(value)  # of a defaultdict one with the same default
    if isinstance(made, dict):
        made.update({key: _copied(item) for key, item in made.items()})
    return made
