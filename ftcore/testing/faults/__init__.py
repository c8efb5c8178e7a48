"""Faults to try a plugin with: what breaks in the middle of a run, made to break when a test says so.

from ftcore.testing.faults import out_of_memory, poison
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "mended": "bits",
    "flip": "bits",
    "files_in": "bits",
    "cut": "bits",
    "tiny_disk": "disk",
    "killed_at": "disk",
    "full_at": "disk",
    "fill": "disk",
    "file_limit": "disk",
    "counted": "disk",
    "slowly": "slow",
    "SlowSteps": "slow",
    "last_step": "kill",
    "Child": "kill",
    "out_of_memory": "oom",
    "poison": "nan",
}
"""Name to the module that has it; each is imported when it is asked for."""

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
