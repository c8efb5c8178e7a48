"""Room on the disk: asked for before anything is written, and missed when it ran out."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from ftcore.errors import Exit, Problem, Refused
from ftcore.report import size

SPARE = 64 * 2**20
"""Bytes that are left to everybody else."""
FULL = frozenset({errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""No space left, file too large, and quota exceeded where there are quotas."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How programs in Rust print the system's error number."""


def need_space(
    folder: Path, needed: int, what: str, fix: str = "free some space, or set output_dir to another disk"
) -> None:
    """Raises Refused when the disk of `folder`, which need not exist yet, has less than `needed` bytes to spare.

    :param what: What would be written, for the message.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed + SPARE:
        message = f"{what} takes {size(needed)}, and {place} has {size(free)} free"
        raise Refused(Problem("output_dir", message, fix, Exit.IO))


def shortage(error: BaseException) -> str | None:
    """The system's words where an error is for want of room on the disk, or of quota; None for any other error.

    Native writers, such as those of safetensors and tokenizers, have exceptions of their own, with the number in it.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = seen.errno if isinstance(seen, OSError) else None
        if number is None and (found := OS_ERROR.search(str(seen))):
            number = int(found[1])
        if number is not None and number in FULL:
            return os.strerror(number)
        seen = seen.__cause__ or seen.__context__
    return None
