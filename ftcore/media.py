"""Files that rows name: found beside the file with the rows, and missed before anything loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def resolved(row: Row, columns: Sequence[str], folder: Path) -> dict[str, Any]:
    """The row with each path in `columns` as one that holds wherever the run stands."""
    return {**row, **{name: _each(row[name], folder) for name in columns if name in row}}


def missing(row: Row, columns: Sequence[str], folder: Path) -> str | None:
    """Why a file that the row names cannot be read, with the fix in a second line; None when all are there."""
    for name in columns:
        for text in _paths(row.get(name)):
            if "://" in text:
                return f"column '{name}' is a link, and links are not fetched\nsave the file and give its path"
            if not _place(text, folder).is_file():
                fix = f"put it there, or give a path from {folder} on, where the rows are"
                return f"column '{name}': there is no file {text}\n{fix}"
    return None


def files_of(row: Row, columns: Sequence[str], folder: Path) -> Iterator[Path | bytes]:
    """The files that a row names, and those that it holds, which are bytes."""
    for name in columns:
        for source in _sources(row.get(name)):
            yield _place(source, folder) if isinstance(source, str) else source


def _place(text: str, folder: Path) -> Path:
    beside = folder / Path(text).expanduser()
    return beside if beside.exists() or not Path(text).exists() else Path(text)


def _each(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return str(_place(value, folder).absolute()) if value and "://" not in value else value
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and not value.get("bytes"):
        return {**value, "path": _each(value["path"], folder)}
    return [_each(item, folder) for item in value] if isinstance(value, list) else value


def _sources(value: Any) -> Iterator[str | bytes]:
    if isinstance(value, (str, bytes)) and value:
        yield value
    elif isinstance(value, Mapping):
        yield from _sources(value.get("bytes") or value.get("path"))
    elif isinstance(value, list):
        for item in value:
            yield from _sources(item)


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value:
        yield value
    elif isinstance(value, Mapping) and not value.get("bytes"):
        yield from _paths(value.get("path"))
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)
