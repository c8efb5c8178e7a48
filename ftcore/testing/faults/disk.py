"""A disk that is full, or that a crash interrupts: by a limit, by a small disk, or at the n-th thing done to it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHANGES = frozenset({"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.link", "os.symlink"})
"""Events of Python's audit hooks that change a folder; files opened for writing come on top."""

_watched: list[Callable[[str, tuple[Any, ...]], None]] = []
_hooked = False


@contextmanager
def full_at(folder: Path, number: int, code: int = errno.ENOSPC) -> Iterator[None]:
    """From the `number`-th change under `folder` on (0 is the first), nothing more can be written there.

    Seen are files that Python opens for writing, and new, renamed and deleted ones. Deleting still works, as on a
    full disk. What native code writes, such as safetensors, is not seen: `file_limit` and `tiny_disk` reach it.
    """
    seen = 0

    def full(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += 1
        if seen > number and event not in ("os.remove", "os.rmdir", "shutil.rmtree"):
            raise OSError(code, os.strerror(code), str(args[0]))

    with _watching(folder, full):
        yield


@contextmanager
def killed_at(folder: Path, number: int) -> Iterator[None]:
    """Kill this process (`kill -9`) just before the `number`-th change under `folder`; for a forked child."""
    seen = 0

    def dead(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    with _watching(folder, dead):
        yield


@contextmanager
def counted(folder: Path) -> Iterator[list[str]]:
    """The changes under `folder`, by the names of their events: how many there are to fail at."""
    events: list[str] = []
    with _watching(folder, lambda event, args: events.append(event)):
        yield events


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """No file can grow past `size` bytes (RLIMIT_FSIZE), whoever in this process writes it: error EFBIG."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def tiny_disk(place: Path, size: int) -> Iterator[Path]:
    """A disk of `size` bytes in memory (tmpfs) at `place`. Raises PermissionError where this process may not mount."""
    place.mkdir(parents=True, exist_ok=True)
    mount = shutil.which("mount")
    if mount is None or not sys.platform.startswith("linux"):
        raise PermissionError("no tmpfs here")
    command = [mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield place
    finally:
        subprocess.run([shutil.which("umount") or "umount", "-l", str(place)], check=True, timeout=30)


def fill(folder: Path, left: int) -> Path:
    """A file in `folder` that leaves `left` bytes of its disk."""
    file = folder / "filler"
    with file.open("ab") as handle:
        while (free := shutil.disk_usage(folder).free) > left:
            handle.write(bytes(min(free - left, 2**20)))
            handle.flush()
    return file


@contextmanager
def _watching(folder: Path, act: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `act` for each change under `folder`, before it is made; what it raises, the change raises."""
    global _hooked
    root = str(folder.resolve())

    def look(event: str, args: tuple[Any, ...]) -> None:
        if (event in CHANGES or (event == "open" and _writes(args))) and _under(args[0], root):
            act(event, args)

    if not _hooked:  # Python has no way to take an audit hook out again: one is put in, and it sleeps
        sys.addaudithook(_hook)
        _hooked = True
    _watched.append(look)
    try:
        yield
    finally:
        _watched.remove(look)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    for look in tuple(_watched):
        look(event, args)


def _writes(args: tuple[Any, ...]) -> bool:
    path, mode, flags = args
    if isinstance(path, int):
        return False
    return any(c in (mode or "") for c in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _under(path: Any, root: str) -> bool:
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    return os.path.abspath(text).startswith(root)
