"""Core's own answers to the hooks. They are `trylast`, so every plugin comes before them."""

from __future__ import annotations

from types import ModuleType


def modules() -> tuple[ModuleType, ...]:
    """The modules with core's hookimpls."""
    from ftcore.defaults import checks, data, format_data, model, optimizer, train

    return checks, model, data, format_data, optimizer, train
