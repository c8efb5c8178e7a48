"""Raw rows of local files, one at a time with file and line, without torch or datasets: for checks before anything loads."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ftcore.errors import Exit, Problem, Refused

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
"""File ending to the builder of `datasets` that reads it."""

Row = Mapping[str, Any]


def local_files(path: str) -> list[Path] | None:
    """The data files behind `data.path`, or None when it is a hub id.

    Raises Refused for a file that is not there, a folder without data, or an ending that is not known.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if f.suffix in LOADERS and not f.name.startswith("."))
        if not files:
            raise Refused(Problem("data.path", f"the folder {path} holds no data files", f"known endings: {', '.join(LOADERS)}", Exit.MISSING_INPUT))
        return files
    if place.is_file():
        if place.suffix not in LOADERS:
            raise Refused(Problem("data.path", f"{path} has an unknown ending", f"known endings: {', '.join(LOADERS)}"))
        return [place]
    looks_local = place.suffix in LOADERS or path.startswith((".", "~", "/")) or "\\" in path or path.count("/") > 1
    if looks_local:
        raise Refused(Problem("data.path", f"there is no file {path}", _beside(place), Exit.MISSING_INPUT))
    return None


def iter_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """(file:line, row) of a file. Raises Refused at the first row that cannot be read."""
    if file.suffix == ".jsonl":
        yield from _jsonl(file)
    elif file.suffix == ".json":
        yield from _json(file)
    elif file.suffix in (".csv", ".tsv"):
        with file.open(encoding="utf-8", newline="") as text:
            reader = csv.DictReader(text, delimiter="\t" if file.suffix == ".tsv" else ",")
            for row in reader:
                yield f"{file}:{reader.line_num}", row
    elif file.suffix == ".txt":
        with file.open(encoding="utf-8") as text:
            for number, line in enumerate(text, 1):
                yield f"{file}:{number}", {"text": line.rstrip("\n")}
    else:
        import pyarrow.parquet as parquet

        number = 0
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row


def _jsonl(file: Path) -> Iterator[tuple[str, Row]]:
    # Read bytes: a line that is not UTF-8 must be named, not end the whole file.
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.strip():
                continue
            place = f"{file}:{number}"
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise _bad(place, f"is not UTF-8 (byte {error.start})", "save the file as UTF-8") from error
            except json.JSONDecodeError as error:
                raise _bad(place, f"is not JSON: {error.msg} at column {error.colno}", "one JSON object a line") from error
            yield place, _mapping(row, place)


def _json(file: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _bad(f"{file}:{error.lineno}", f"is not JSON: {error.msg} at column {error.colno}", "a list of objects") from error
    if not isinstance(rows, list):
        raise _bad(str(file), "holds no list of rows", "a .json file is a list of objects; use .jsonl for one object a line")
    for number, row in enumerate(rows, 1):
        place = f"{file}: row {number}"
        yield place, _mapping(row, place)


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise _bad(place, f"is a {type(row).__name__}, not an object", 'each row looks like {"column": value}')
    return row


def _bad(place: str, message: str, fix: str) -> Refused:
    return Refused(Problem(place, message, fix, Exit.DATA))


def _beside(place: Path) -> str:
    from ftcore.catalog import nearest

    names = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    near = nearest(place.name, names)
    return f"did you mean {place.parent / near}?" if near else "paths are relative to where you run ftcore"
