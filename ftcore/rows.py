"""Where rows are: local files, hub ids, and the place of a row that is at fault; without torch or datasets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftcore.errors import Exit, Problem, Refused
from ftcore.readers import Row as Row
from ftcore.readers import iter_rows as iter_rows

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
"""File ending to the builder of `datasets` that reads it."""


def sources(path: Any, key: str = "data.path") -> list[str]:
    """`data.path` as the list that it is: one file, folder or hub id, or several that are mixed.

    Raises Refused for what is neither.
    """
    if isinstance(path, str):
        return [path]
    if isinstance(path, Sequence) and path and all(isinstance(one, str) for one in path):
        return list(path)
    kind = "an empty list" if isinstance(path, Sequence) else f"a {type(path).__name__}"
    fix = f"give a file, a folder or a hub id, or a list of them: '{key}=[a.jsonl,b.jsonl]'"
    raise Refused(Problem(key, f"is {kind if not path else f'{path!r}'}", fix))


def local_files(path: str, key: str = "data.path") -> list[Path] | None:
    """The data files behind `data.path`, or None when it is a hub id.

    Raises Refused for a file that is not there, a folder without data, or an ending that is not known.
    """
    place = Path(path).expanduser()
    endings = f"known endings: {', '.join(LOADERS)}"
    if place.is_dir():
        found = (f for f in place.rglob("*") if f.suffix.lower() in LOADERS)
        files = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(place).parts))
        if not files:
            raise Refused(Problem(key, f"the folder {path} holds no data files", endings, Exit.MISSING_INPUT))
        _one_split(files, place, key)
        return files
    if place.is_file():
        if place.suffix.lower() not in LOADERS:
            raise Refused(Problem(key, f"{path} has an unknown ending", endings))
        return [place]
    looks_local = (
        place.suffix.lower() in LOADERS or path.startswith((".", "~", "/")) or "\\" in path or path.count("/") > 1
    )
    if looks_local:
        raise Refused(Problem(key, f"there is no file {path}", beside(place), Exit.MISSING_INPUT))
    return None


HELD_OUT = ("test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev", "holdout", "heldout")
SPLITS = {"train": "train", "training": "train", **dict.fromkeys(HELD_OUT, "test")}


def _one_split(files: list[Path], folder: Path, key: str) -> None:
    """A folder with rows to train on and rows to hold out, by the names of files and folders, is not read as a heap."""
    found: dict[str, Path] = {}
    for file in files:
        *folders, _ = file.relative_to(folder).parts
        said = [
            {SPLITS[word] for word in re.split(r"[^a-z]", name.lower()) if word in SPLITS}
            for name in (*folders, file.stem)
        ]
        if len(set().union(*said)) == 1:
            first = next(number for number, words in enumerate(said) if words)
            found.setdefault(said[first].pop(), folder.joinpath(*folders[: first + 1]) if folders[first:] else file)
    if len(found) > 1:
        train, test = (str(found[name].relative_to(folder)) for name in ("train", "test"))
        message = f"the folder {folder} holds both {train} and {test}"
        fix = f"name them: data.path={found['train']} data.eval_path={found['test']}"
        raise Refused(Problem(key, message, fix))


def hub_rows(path: str, split: str, key: str = "data.path", subset: str | None = None) -> Iterator[tuple[str, Row]]:
    """(place, row) of a data set on the hub, read as a stream. Raises Refused when it cannot be reached."""
    from datasets import load_dataset

    try:
        stream = load_dataset(path, subset, split=split, streaming=True)
    except Exception as error:  # the hub's and the network's errors are many; all mean that the rows are not to be had
        message = (
            f"{path} is no file here, and no data set with a split '{split}' could be reached ({type(error).__name__})"
        )
        raise Refused(
            Problem(key, message, "give a local file, or check the hub id and data.split", Exit.MISSING_INPUT)
        ) from error
    # Undecoded: `datasets` would open, or fetch, whatever the path of an image or a recording says.
    for number, row in enumerate(stream.decode(False), 1):
        yield f"{path} row {number}", row


class Places:
    """Where in local files a row stands, looked for only once it is at fault.

    :param columns: `data.columns`, by whose names the rows are given.
    """

    def __init__(
        self, paths: Sequence[str], media: Sequence[str] = (), columns: Mapping[str, str] | None = None
    ) -> None:
        self._paths, self._media, self._columns = paths, media, columns or {}
        self._index: dict[str, list[str]] | None = None

    def of(self, row: Row, many: bool = False) -> str | None:
        """file:line of the first row that is this one, whatever nulls `datasets` added; else None.

        :param many: it will be asked of many rows, so that all places are noted at once.
        """
        wanted = without_nulls(row)
        if not many:
            return next((place for place, found in self._all() if found == wanted), None)
        if self._index is None:
            self._index = {}
            for place, found in self._all():
                self._index.setdefault(_digest(found), []).append(place)
        places = self._index.get(_digest(wanted)) or []
        # Rows that are the same are asked for in their order.
        return (places.pop(0) if len(places) > 1 else places[0]) if places else self.of(row)

    def _all(self) -> Iterator[tuple[str, Any]]:
        from ftcore.columns import named
        from ftcore.media import resolved

        for path in self._paths:
            for file in local_files(path) or ():
                for place, row in iter_rows(file, aside=lambda problem: None):
                    yield place, without_nulls(resolved(named(row, self._columns), self._media, file.parent))


def _digest(row: Any) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=repr).encode()).hexdigest()


def without_nulls(value: Any) -> Any:
    """The value without the keys that Arrow, or `datasets`, fills in objects where others have them."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def row_problem(place: str, reason: str, note: str = "") -> Problem:
    """What a format's check found, as a problem: a second line of the reason is the fix."""
    message, _, fix = reason.partition("\n")
    return Problem(place, f"{message}{note}", fix or "mend the row, or take it out", Exit.DATA)


def all_held_out(held_out: int, rows: int) -> Problem:
    """`data.eval_size` takes every row."""
    message = f"holds out {held_out} of {rows} rows, which leaves none to train on"
    return Problem("data.eval_size", message, "give a smaller number, or set data.eval_path")


def beside(place: Path) -> str:
    """The fix for a file that is not there: one beside it with much the same name."""
    from ftcore.catalog import nearest

    names = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    near = nearest(place.name, names)
    return f"did you mean {place.parent / near}?" if near else "paths are relative to where you run ftcore"
