"""One process writes into a run folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ftcore.errors import Exit, Problem, Refused

NAME = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder for as long as the block runs; the system lets go of it when the process ends, however it does.

    Raises Refused when another process holds it.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / NAME)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        message = f"{folder} is written by another process"
        fix = "wait for it, or name another folder"
        raise Refused(Problem("output_dir", message, fix, Exit.BUSY)) from error
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Whether a process writes into the folder now."""
    from filelock import FileLock, Timeout

    if not (folder / NAME).is_file():
        return False
    try:
        with FileLock(folder / NAME).acquire(timeout=0):
            return False
    except Timeout:
        return True
