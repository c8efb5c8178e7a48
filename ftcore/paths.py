"""Where ftcore keeps what it may make again, and how a folder is written so that it is whole or not there."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.replace(old / target.name)
            work.replace(target)
            shutil.rmtree(old)
        else:
            work.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def new_run_dir(name: str, root: Path = Path("runs")) -> Path:
    """A run folder that does not exist yet: `runs/<name>-<number>`."""
    taken = [p.name.rpartition("-")[2] for p in root.glob(f"{name}-*")]
    number = max((int(t) for t in taken if t.isdigit()), default=0) + 1
    return root / f"{name}-{number:03d}"
