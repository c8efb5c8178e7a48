"""The manifest of a checkpoint: written last, it says that the folder is whole, and by which bytes.

A folder without one was never finished. The order (files, their fsync, manifest, rename, fsync of the parent) is that
of POSIX's rules for a rename that survives a crash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAME = "manifest.json"
VERSION = 1
PART = ".tmp-"
"""Beginning of the names of folders that are not finished."""


@contextmanager
def sealed(target: Path, about: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write into that becomes `target`, with a manifest, when the block ends well.

    It is there whole or not at all, also after a crash or loss of power. A finished `target` is replaced.

    :param about: what else the manifest says, such as the step.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f"{PART}{target.name}-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        files = {_name(file, work): _entry(file) for file in _files(work)}
        for file in _files(work):
            _sync(file)
        content: dict[str, Any] = {"version": VERSION, **about, "files": files}
        content["seal"] = _seal(content)
        (work / NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        _sync(work / NAME)
        for folder in [work, *(path for path in work.rglob("*") if path.is_dir())]:
            _sync(folder)
        if target.exists():  # the same step again, after going on from an older one
            old = target.parent / f"{PART}old-{target.name}-{os.getpid()}"
            target.replace(old)
            work.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            work.replace(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None: every file is there with the size and the SHA-256 of its manifest."""
    file = folder / NAME
    if not file.is_file():
        return f"it has no {NAME}: it was never finished"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {NAME} is damaged: {error}"
    if content.get("seal") != _seal(content):
        return f"its {NAME} is not as it was written"
    found = {_name(path, folder) for path in _files(folder)} - {NAME}
    if missing := sorted(set(files) - found):
        return f"{missing[0]} is missing"
    if strange := sorted(found - set(files)):
        return f"{strange[0]} is none of its files"
    for name, (size, digest) in files.items():
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes, not {size}"
        if _digest(folder / name) != digest:
            return f"{name} is not as it was written (SHA-256)"
    return None


def about(folder: Path) -> dict[str, Any]:
    """What the manifest of a valid checkpoint says."""
    content: dict[str, Any] = json.loads((folder / NAME).read_text(encoding="utf-8"))
    return content


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())


def _name(file: Path, folder: Path) -> str:
    return file.relative_to(folder).as_posix()


def _entry(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": _digest(file)}


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    """A hash of the manifest itself, so that a changed step or name shows as well."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and journals its renames
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
