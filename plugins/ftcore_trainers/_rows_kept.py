"""Rows that are too long to train on are dropped out loud, and a data set of nothing else is refused."""

from __future__ import annotations

from typing import Any

from ftcore import Problem, Refused
from ftcore.errors import Exit
from ftcore.report import note


def say_dropped(name: str, before: Any, after: Any, length: int) -> None:
    """Say how many rows of a split are gone; a stream has no length, and nothing is said of it.

    Raises Refused where none is left.
    """
    try:
        given, kept = len(before), len(after)
    except TypeError:
        return
    if not kept:
        message = f"no row of the {name} split has room for its answers within {length} tokens"
        raise Refused(Problem("data", message, "raise trainer.max_length", Exit.DATA))
    if kept < given:
        note(f"{given - kept} of {given} {name} rows dropped: too long for trainer.max_length={length}")
