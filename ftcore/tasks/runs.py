"""`ftcore runs`: the runs under a folder, newest first."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftcore.artifacts import RUN_FILE
from ftcore.errors import Exit, Problem, Refused
from ftcore.report import note, table
from ftcore.run_state import read_run


def main(argv: list[str]) -> int:
    """Print one line per run."""
    parser = argparse.ArgumentParser("ftcore runs", description="List the runs, newest first.")
    parser.add_argument("folder", nargs="?", default="runs", help="folder that holds the runs (runs)")
    folder = Path(parser.parse_args(argv).folder)
    if not folder.is_dir() and folder != Path("runs"):
        raise Refused(Problem("runs", f"there is no folder {folder}", code=Exit.MISSING_INPUT))
    found = sorted(_found(folder), key=lambda pair: str(pair[1].get("started")), reverse=True)
    if not found:
        note(f"no runs under {folder}/")
        return 0
    table(
        (_line(path, state) for path, state in found), header=("run", "status", "steps", "loss", "eval loss", "started")
    )
    return 0


def _found(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for file in folder.rglob(RUN_FILE):
        if state := read_run(file.parent):
            yield file.parent, state


def _line(path: Path, state: dict[str, Any]) -> tuple[object, ...]:
    metrics = state.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    return (
        path,
        state["status"],
        state.get("steps", "-"),
        _number(metrics.get("loss_last")),
        _number(metrics.get("eval_loss")),
        state.get("started", "-"),
    )


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"
