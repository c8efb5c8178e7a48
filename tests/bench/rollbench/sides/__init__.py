"""The sides: each module's `run(work)` returns what was measured."""

from __future__ import annotations

import importlib
import importlib.util
import json
from typing import Any

from stepbench.sides import NEEDS

from rollbench.works import RollWork


def inner(side: str) -> None:
    """The inner form of `rollout_speed.py`."""
    from stepbench import processes, sides

    def run(text: str) -> dict[str, Any]:
        work = RollWork(**json.loads(text))
        if importlib.util.find_spec(NEEDS[side]) is None:
            return {"status": "missing", "detail": f"{NEEDS[side]} is not installed"}
        result = importlib.import_module(f"rollbench.sides.{side}").run(work)
        return {"status": "ok", **result, "versions": sides.versions()}

    processes.answer(lambda: sides.imports(side), run)
