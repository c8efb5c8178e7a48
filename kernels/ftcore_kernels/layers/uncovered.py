"""What happens to a call that a kernel does not compute: the family's own forward does, and that is said once."""

from __future__ import annotations

import functools

from ftcore.report import note


class Uncovered(Exception):
    """The call or the module is not what the kernel computes; the text says why."""


@functools.cache
def say(parts: str, reason: str) -> None:
    """Once for each reason: what trains more slowly than the report says."""
    note(f"{parts} run as transformers' own in training: {reason}")
