"""`run.json` of a run folder, as others read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ftcore.artifacts import RUN_FILE


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json of a run folder, or None where there is none, or one that is damaged or not ftcore's."""
    try:
        state = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # ValueError: neither UTF-8 nor JSON
        return None
    return state if isinstance(state, dict) and isinstance(state.get("status"), str) else None


def state_of(folder: Path) -> str | None:
    """`running`, `stopped`, `failed` or `done`; None where there is no run. A killed run is left as `running`."""
    state = read_run(folder)
    return state["status"] if state else None
