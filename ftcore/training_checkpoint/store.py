"""The checkpoints of a run: which one to go on from, and which ones go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ftcore.errors import Exit, Problem, Refused
from ftcore.report import note
from ftcore.training_checkpoint.manifest import PART, fault

NAME = re.compile(r"checkpoint-(\d+)")
ASIDE = "damaged"
"""Folder beside the checkpoints that damaged ones are moved to: they may still tell what happened."""


def step_of(folder: Path) -> int:
    """The step that a checkpoint was written after; -1 for any other folder."""
    found = NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def all_of(folder: Path) -> list[Path]:
    """The checkpoints under `folder`, whether they are valid or not, the newest first."""
    found = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()] if folder.is_dir() else []
    return sorted((path for path in found if step_of(path) >= 0), key=step_of, reverse=True)


def newest_valid(folder: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; None where there is none.

    Damaged ones are named and moved aside. What an interrupted save left is deleted.
    """
    for path in folder.glob(f"{PART}*") if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    for path in all_of(folder):
        reason = fault(path)
        if reason is None:
            return path
        kept = _aside(path)
        note(f"{path} is not used: {reason}; kept as {kept}")
    return None


def checked(folder: Path) -> Path:
    """A checkpoint that the user named. Raises Refused when it is damaged."""
    if reason := fault(folder):
        fix = "name another checkpoint, or write resume=last for the newest good one"
        raise Refused(Problem("resume", f"{folder} cannot be used: {reason}", fix, Exit.DATA))
    return folder


def rotate(folder: Path, keep: int | None, spared: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints, once the newest one is known to be good.

    :param keep: None keeps all.
    :param spared: one that stays in any case, such as the best so far.

    Raises Refused when the one that was just written is not what was meant to be written.
    """
    there = all_of(folder)
    if keep is None or len(there) <= max(keep, 1):
        return
    if reason := fault(there[0]):
        message = f"{there[0]} was written, but {reason}; older checkpoints are kept"
        raise Refused(Problem("output_dir", message, "check the disk, then run the same command again", Exit.IO))
    for path in there[max(keep, 1) :]:
        if path != spared:
            shutil.rmtree(path)


def _aside(path: Path) -> Path:
    place = path.parent / ASIDE
    place.mkdir(exist_ok=True)
    number = next(n for n in range(1, 10_000) if not (place / f"{path.name}-{n}").exists())
    return path.replace(place / f"{path.name}-{number}")
