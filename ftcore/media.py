"""Files that rows name: found beside the file with the rows, and missed before anything loads.

Rows are written by others, so what they name is read only where it lies in the folder of the rows, or where the run's
config says that it may: `data.allow_roots` for folders, `data.allow_hosts` for links.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ftcore.config import DataConfig

Row = Mapping[str, Any]

PORTS = {"http": 80, "https": 443}
"""Schemes of links that can be allowed, and their usual ports."""


@dataclass(frozen=True)
class Reach:
    """What rows may name besides the files in their own folder."""

    roots: tuple[str, ...] = ()
    """Folders, without symlinks."""
    hosts: tuple[str, ...] = ()
    """Hosts, each with its port unless that is the usual one."""

    @classmethod
    def of(cls, data: DataConfig, folders: Iterable[Path] = ()) -> Reach:
        """What a run's config allows, and the folders given."""
        roots = [os.path.realpath(os.path.expanduser(folder)) for folder in (*map(str, folders), *data.allow_roots)]
        return cls(tuple(dict.fromkeys(roots)), tuple(host.lower() for host in data.allow_hosts))

    def holds(self, place: str, folder: Path | None) -> bool:
        """Whether a file, once its symlinks are followed, lies in the rows' folder or in one that is allowed."""
        own = [os.path.realpath(folder)] if folder is not None else []
        return any(Path(place).is_relative_to(root) for root in (*own, *self.roots))

    def answers(self, link: str) -> bool:
        """Whether a link may be fetched."""
        return (host := host_of(link)) is not None and host in self.hosts


OWN_FOLDER = Reach()
"""Nothing but the rows' own folder."""


def is_link(text: str) -> bool:
    """Whether a row's text is an address rather than a path."""
    return "://" in text


def host_of(link: str) -> str | None:
    """The host of an http or https link, with its port unless that is the usual one; None for any other."""
    try:
        parts = urlsplit(link)
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
    except ValueError:  # brackets or a port that are none
        return None
    if scheme not in PORTS or not host:
        return None
    return host if port in (None, PORTS[scheme]) else f"{host}:{port}"


def resolved(row: Row, columns: Sequence[str], folder: Path) -> dict[str, Any]:
    """The row with each path in `columns` as one that holds wherever the run stands; nothing is opened."""
    return {**row, **{name: _each(row[name], folder) for name in columns if name in row}}


def reaching(row: Row, columns: Sequence[str], reach: Reach, folder: Path | None = None) -> str | None:
    """Why a row names what it may not, with the fix in a second line; None when it names nothing else. Opens nothing.

    :param folder: that of the rows, or None where their paths are whole already, or the rows are not of this machine.
    """
    for name in columns:
        for text in paths_of(row, [name]):
            if is_link(text):
                if not reach.answers(text):
                    return _strange_link(name, text)
                continue
            place = _real(text, folder)
            if place is None:
                return f"column '{name}' is no path: {text[:80]!r}\ngive the path of a file"
            if not reach.holds(place, folder):
                fix = f"put it beside the rows, or allow its folder: 'data.allow_roots=[{os.path.dirname(place)}]'"
                return f"column '{name}' names {text}, which lies outside the folder of the rows\n{fix}"
    return None


def _strange_link(name: str, text: str) -> str:
    host, said = host_of(text), f"column '{name}' is a link ({text[:80]}), and links are not fetched"
    fix = f"save the file and give its path, or allow the host: 'data.allow_hosts=[{host}]'"
    return f"{said}\n{fix if host else 'save the file and give its path'}"


def missing(row: Row, columns: Sequence[str], folder: Path, reach: Reach = OWN_FOLDER) -> str | None:
    """Why a file that the row names cannot be read, with the fix in a second line; None when all are there."""
    if reason := reaching(row, columns, reach, folder):
        return reason
    for name in columns:
        for text in paths_of(row, [name]):
            if not is_link(text) and not _place(text, folder).is_file():
                fix = f"put it there, or give a path from {folder} on, where the rows are"
                return f"column '{name}': there is no file {text}\n{fix}"
    return None


def files_of(row: Row, columns: Sequence[str], folder: Path) -> Iterator[Path | bytes]:
    """The files that a row names, and those that it holds, which are bytes; links are none of them."""
    for name in columns:
        for source in _sources(row.get(name)):
            if isinstance(source, bytes):
                yield source
            elif not is_link(source):
                yield _place(source, folder)


def paths_of(row: Row, columns: Sequence[str]) -> Iterator[str]:
    """Paths and links that a row names, as it says them."""
    return (source for name in columns for source in _sources(row.get(name)) if isinstance(source, str))


def fetched(row: Row, columns: Sequence[str], fetch: Callable[[str], bytes]) -> dict[str, Any]:
    """The row with the bytes of its links in their place, all of its media in the form `{path, bytes}`."""
    return {**row, **{name: _held(row[name], fetch) for name in columns if name in row}}


def _held(value: Any, fetch: Callable[[str], bytes]) -> Any:
    if isinstance(value, str) and value:
        return {"path": "", "bytes": fetch(value)} if is_link(value) else {"path": value, "bytes": b""}
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and not value.get("bytes"):
        return {**value, **_held(value["path"], fetch)} if value["path"] else value
    return [_held(item, fetch) for item in value] if isinstance(value, list) else value


def _place(text: str, folder: Path) -> Path:
    # `~` stays a name: it would be somebody's home.
    beside = folder / text
    return beside if beside.exists() or not Path(text).exists() else Path(text)


def _real(text: str, folder: Path | None) -> str | None:
    """The path without symlinks; None for what no path can be. Nothing is opened."""
    try:
        place = Path(text) if folder is None else _place(text, folder)
        place.is_file()
        return os.path.realpath(place)
    except (OSError, ValueError):  # too long a name, or a zero byte in it
        return None


def _each(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        bare = not value or is_link(value) or _real(value, folder) is None
        return value if bare else str(_place(value, folder).absolute())
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
