"""Files that are not as they were written: a flipped bit, a lost end."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def flip(file: Path, draw: random.Random) -> tuple[int, int]:
    """Flip one bit of a file that is not empty; which byte, and which of its bits."""
    place, bit = draw.randrange(file.stat().st_size), draw.randrange(8)
    with file.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)[0]
        handle.seek(place)
        handle.write(bytes([byte ^ 1 << bit]))
    return place, bit


def cut(file: Path, draw: random.Random) -> int:
    """Cut a file that is not empty off; how many bytes it has left, always fewer than before."""
    left = draw.randrange(file.stat().st_size)
    with file.open("r+b") as handle:
        handle.truncate(left)
    return left


@contextmanager
def mended(file: Path) -> Iterator[None]:
    """Whatever happens to the file inside the block, it is as before after it."""
    whole = file.read_bytes()
    try:
        yield
    finally:
        file.write_bytes(whole)


def files_in(folder: Path) -> list[Path]:
    """All files under a folder that have a byte to damage, in a fixed order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
