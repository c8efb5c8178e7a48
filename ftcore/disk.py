"""Room on the disk, asked for before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from ftcore.errors import Exit, Problem, Refused
from ftcore.report import size

SPARE = 64 * 2**20
"""Bytes that are left to everybody else."""


def need_space(folder: Path, needed: int, what: str) -> None:
    """Raises Refused when the disk of `folder`, which need not exist yet, has less than `needed` bytes to spare.

    :param what: What would be written, for the message.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + SPARE:
        message = f"{what} takes {size(needed)}, and {place} has {size(free)} free"
        raise Refused(Problem("output_dir", message, "free some space, or set output_dir to another disk", Exit.IO))
