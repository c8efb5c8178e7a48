"""The two sides: each module's `run(work)` returns what was measured."""

from __future__ import annotations

import importlib
import json
from typing import Any

from rlbench.works import TrainerWork

SIDES = ("trl", "ftcore")


def inner(side: str) -> None:
    """The inner form of `preference_step.py`."""
    from stepbench import processes, sides

    def run(text: str) -> dict[str, Any]:
        work = TrainerWork(**json.loads(text))
        result = importlib.import_module(f"rlbench.sides.{side}").run(work)
        return {"status": "ok", **result, "versions": sides.versions()}

    processes.answer(lambda: sides.imports(side), run)
