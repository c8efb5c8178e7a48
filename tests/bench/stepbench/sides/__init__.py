"""The sides that are compared: each module's `run(work)` returns what was measured."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

from stepbench.works import Work

NEEDS = {
    "hf": "peft",
    "liger": "liger_kernel",
    "unsloth": "unsloth",
    "trl": "trl",
    "ftcore": "ftcore",
    "ftcore_trainer": "ftcore",
}
"""Side to the package that it measures."""
PEERS = frozenset({"liger", "unsloth"})
"""Sides that run after the `--peers` command."""
MEMORY = frozenset({"ftcore", "ftcore_trainer"})
"""Sides that know ftcore's `memory`, and run once for each of its settings."""

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "unsloth", "ftcore")


def imports(side: str) -> None:
    """Import what takes seconds and needs no work; a peer that rewrites transformers comes before it."""
    for package in (NEEDS[side], "torch", "transformers", "peft"):
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(package)


def run(side: str, work: Work) -> dict[str, Any]:
    """Measure a side in this process."""
    if importlib.util.find_spec(NEEDS[side]) is None:
        return {"status": "missing", "detail": f"{NEEDS[side]} is not installed"}
    result = importlib.import_module(f"stepbench.sides.{side}").run(work)
    return {"status": "ok", **result, "versions": versions()}


def versions() -> dict[str, str]:
    """The versions of the packages that matter, as far as they are here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
