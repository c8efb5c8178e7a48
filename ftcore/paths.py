"""Where ftcore keeps what it may make again, how folders are written whole or not at all, and names from outside."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftcore.config import RunConfig


def cache_dir() -> Path:
    """ftcore's cache: `$XDG_CACHE_HOME/ftcore`, on Windows under `%LOCALAPPDATA%`. Everything in it can be deleted."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ftcore"


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = _fresh(target)
    try:
        yield work
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent)) / target.name
            target.replace(old)
            work.replace(target)
            _dispose(old, target)
        else:
            work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fresh(target: Path) -> Path:
    """A new folder beside `target`, with the rights that the umask gives; `tempfile` makes private ones."""
    while True:
        work = target.parent / f".{target.name}-{secrets.token_hex(4)}"
        try:
            work.mkdir()
        except FileExistsError:
            continue
        return work


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to that becomes `target` when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work / target.name
        (work / target.name).replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


RESERVED = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(?:[ .].*)?", re.IGNORECASE)
"""Names that are devices on Windows, with any ending."""
STRANGE = re.compile(r"[\x00-\x1f\x7f<>:\"|?*\\]|^~")
"""Characters that no name may have: they mean something to Windows, to a shell or to a terminal."""


def safe_join(root: Path, name: object, follow: bool = False) -> Path:
    """`root / name` for a name that others chose, such as one in an index of weights: always below `root`.

    The rules of POSIX and of Windows hold together, wherever this runs: a name is either harmless on both or none.
    :param follow: a link there may lead elsewhere, as all files of the hub's cache do.
    Raises ValueError with the reason for a name that leaves the folder, or is none on some system.
    """
    if not isinstance(name, str) or not name:
        raise ValueError("it is no name")
    if found := STRANGE.search(name):
        raise ValueError(f"it holds {found[0]!r}")
    for part in name.split("/"):
        if part in ("", ".", ".."):
            raise ValueError("it is not a path below the folder")
        if part != part.rstrip(" .") or RESERVED.fullmatch(part):
            raise ValueError("it is no name on Windows")
        if len(part.encode("utf-8", "surrogatepass")) > 255 or any("\ud800" <= c <= "\udfff" for c in part):
            raise ValueError("it is too long, or no text")
    place = root / name
    real, below = os.path.realpath(place), os.path.realpath(root)
    if not follow and not Path(real).is_relative_to(below):
        raise ValueError("a link leads out of the folder")
    return place


def _dispose(old: Path, target: Path) -> None:
    """Delete a replaced folder, unless it holds files that the new one does not: somebody else's are kept beside it."""
    ours = {f.relative_to(target) for f in target.rglob("*")}
    if all(f.relative_to(old) in ours for f in old.rglob("*")):
        shutil.rmtree(old.parent)
        return
    number = next(n for n in range(1, 10_000) if not (target.parent / f"{target.name}.old-{n}").exists())
    old.replace(target.parent / f"{target.name}.old-{number}")
    old.parent.rmdir()


def claim_run_dir(wanted: Path) -> Path:
    """Make the run folder; where another run was quicker, the next free number."""
    name = wanted.name.rpartition("-")[0]
    while True:
        try:
            wanted.mkdir(parents=True)
        except FileExistsError:
            wanted = new_run_dir(name, wanted.parent)
        else:
            return wanted


def run_name(run: RunConfig) -> str:
    """What a run's folder is called before its number: the model, and the trainer."""
    names = [run.model.name if run.model else "", run.trainer.name if run.trainer else ""]
    # `dist:name` tells two packages apart, but Windows takes no colon in a file name.
    return "-".join(name.rpartition(":")[2] for name in names if name)


def new_run_dir(name: str, root: Path = Path("runs")) -> Path:
    """A run folder that does not exist yet: `runs/<name>-<number>`."""
    taken = [p.name.rpartition("-")[2] for p in root.glob(f"{name}-*")]
    number = max((int(t) for t in taken if t.isdigit()), default=0) + 1
    return root / f"{name}-{number:03d}"
