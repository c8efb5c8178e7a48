"""The same command goes on by itself: it finds the run of its own that was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ftcore import drift
from ftcore.config import RunConfig
from ftcore.locks import NAME, is_held
from ftcore.paths import run_name
from ftcore.report import note
from ftcore.run_state import state_of
from ftcore.training_checkpoint import store

NEVER = "never"
"""Value of `resume.checkpoint` that starts anew."""
INTERRUPTED = frozenset({"running", "stopped", "failed"})
"""States of a run that did not end."""
BEGUN = ("config.yaml", "run.json", "metrics.jsonl")
"""What a run leaves that was stopped before it saved anything."""
TRAINED = "trained"
"""Folder with what a run trained: there before its exports are."""


def started(config: RunConfig) -> RunConfig:
    """A recorded config that is trained again gets a new folder, but `resume=last` goes on in the one that it names."""
    if config.run is None:
        return config
    folder = config.run if config.resume.checkpoint == "last" and config.output_dir is None else config.output_dir
    return replace(config, run=None, output_dir=folder)


def going_on(run: RunConfig, root: Path = Path("runs")) -> RunConfig:
    """The config that goes on with an interrupted run of the same command, or `run` itself where there is none.

    In `output_dir`, where that is set; else the newest one under `root` that began with the same config. One that
    another process still trains is left alone. One that was stopped without a checkpoint begins again in the same
    folder, and what it left is moved into `interrupted-1` there, or the next free number.
    """
    if run.resume.checkpoint is not None or run.trainer is None or run.model is None:
        return run
    for folder in _candidates(run, root):
        checkpoints = store.all_of(folder / "checkpoints")
        if checkpoints:
            note(f"going on with {folder} after step {store.step_of(checkpoints[0])}; resume=never starts anew")
            return replace(run, output_dir=str(folder), resume=replace(run.resume, checkpoint="last"))
        recorded = (folder / drift.RECORD).is_file()
        if not _failed_after_training(folder) and not (recorded and list(drift.of_command(run, folder))):
            reason = "it left no checkpoint" if _trained(folder) else "it was stopped before its first checkpoint"
            note(f"beginning again in {folder}: {reason}; what it left is in {_set_aside(folder)}")
            return replace(run, output_dir=str(folder))
    return run


def _trained(folder: Path) -> bool:
    return (folder / TRAINED).is_dir()


def _failed_after_training(folder: Path) -> bool:
    """An export that fails would fail again: `ftcore export run=FOLDER` is for that, and training anew is not."""
    return _trained(folder) and state_of(folder) == "failed"


def _set_aside(folder: Path) -> Path:
    number = next(n for n in range(1, 10_000) if not (folder / f"interrupted-{n}").exists())
    place = folder / f"interrupted-{number}"
    place.mkdir()
    for name in (*BEGUN, TRAINED):
        if (folder / name).exists():
            (folder / name).replace(place / name)
    return place


def _candidates(run: RunConfig, root: Path) -> Iterator[Path]:
    if run.output_dir is not None:
        if _interrupted(Path(run.output_dir)):
            yield Path(run.output_dir)
        return
    name = run_name(run)
    numbered = [(int(n), p) for p in root.glob(f"{name}-*") if (n := p.name.removeprefix(f"{name}-")).isdigit()]
    for _, folder in sorted(numbered, reverse=True):
        if _interrupted(folder) and (folder / drift.RECORD).is_file() and not list(drift.of_command(run, folder)):
            yield folder


def _interrupted(folder: Path) -> bool:
    """Whether a run began there and did not end; one that was killed at once has only its lock to show for it."""
    state = state_of(folder)
    begun = state in INTERRUPTED or (state is None and (folder / NAME).is_file())
    return begun and any((folder / name).exists() for name in BEGUN) and not is_held(folder)
