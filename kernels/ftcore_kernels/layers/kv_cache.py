"""The cache of keys and values in a forward's arguments: `cache` since transformers 5.24, `past_key_values` before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = ("cache", "past_key_values")


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache, or None."""
    return next((arguments[name] for name in NAMES if arguments.get(name) is not None), None)


def cache_of(output: Mapping[str, Any]) -> dict[str, Any]:
    """A model's output's cache by the name that its transformers has for it; nothing where there is none."""
    return {name: output[name] for name in output if name in NAMES}
