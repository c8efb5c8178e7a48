"""Raw rows, one at a time with file and line, without torch or datasets: for checks before anything loads."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftcore.errors import Exit, Problem, Refused

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}
"""File ending to the builder of `datasets` that reads it."""

Row = Mapping[str, Any]


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
        found = (f for f in place.rglob("*") if f.suffix in LOADERS)
        files = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(place).parts))
        if not files:
            raise Refused(Problem(key, f"the folder {path} holds no data files", endings, Exit.MISSING_INPUT))
        _one_split(files, path, key)
        return files
    if place.is_file():
        if place.suffix not in LOADERS:
            raise Refused(Problem(key, f"{path} has an unknown ending", endings))
        return [place]
    looks_local = place.suffix in LOADERS or path.startswith((".", "~", "/")) or "\\" in path or path.count("/") > 1
    if looks_local:
        raise Refused(Problem(key, f"there is no file {path}", beside(place), Exit.MISSING_INPUT))
    return None


SPLITS = {"train": "train", "test": "test", "eval": "test", "valid": "test", "validation": "test", "dev": "test"}


def _one_split(files: list[Path], path: str, key: str) -> None:
    """A folder with rows to train on and rows to hold out is not read as one heap."""
    found: dict[str, Path] = {}
    for file in files:
        word = re.split(r"[^a-z]", file.stem.lower())[0]
        if word in SPLITS:
            found.setdefault(SPLITS[word], file)
    if len(found) > 1:
        message = f"the folder {path} holds both {found['train'].name} and {found['test'].name}"
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
    for number, row in enumerate(stream, 1):
        yield f"{path} row {number}", row


def iter_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """(file:line, row) of a file. Raises Refused at the first row that cannot be read."""
    if file.suffix == ".jsonl":
        yield from _jsonl(file)
    elif file.suffix == ".json":
        yield from _json(file)
    elif file.suffix in (".csv", ".tsv"):
        yield from _csv(file, "\t" if file.suffix == ".tsv" else ",")
    elif file.suffix == ".txt":
        for number, line in _lines(file):
            if line.strip():
                yield f"{file}:{number}", {"text": line.rstrip("\r\n")}
    else:
        yield from _parquet(file)


def place_of(row: Row, path: str, media: Sequence[str] = (), columns: Mapping[str, str] | None = None) -> str | None:
    """file:line of the first row in local files that is this one, whatever nulls `datasets` added; else None.

    :param columns: `data.columns`, by whose names the row is given.
    """
    from ftcore.columns import named
    from ftcore.media import resolved

    wanted = _without_nulls(row)
    for file in local_files(path) or ():
        for place, found in iter_rows(file):
            if _without_nulls(resolved(named(found, columns or {}), media, file.parent)) == wanted:
                return place
    return None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def row_problem(place: str, reason: str, note: str = "") -> Problem:
    """What a format's check found, as a problem: a second line of the reason is the fix."""
    message, _, fix = reason.partition("\n")
    return Problem(place, f"{message}{note}", fix or "mend the row, or take it out", Exit.DATA)


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    # Read bytes: a line that is not UTF-8 must be named, not end the whole file.
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _bad(
                    f"{file}:{number}", f"is not UTF-8 (byte {error.start + 1} of the line)", "save the file as UTF-8"
                ) from error


def _jsonl(file: Path) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(file):
        if line.strip():
            place = f"{file}:{number}"
            yield (
                place,
                _mapping(_parsed(line, file, number, "a .jsonl file has one whole JSON object in each line"), place),
            )


def _json(file: Path) -> Iterator[tuple[str, Row]]:
    text = "".join(line for _, line in _lines(file))
    if _object_per_line(text):
        yield from _jsonl(file)
        return
    rows = _parsed(text, file, 1, "a .json file is one list of objects")
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        raise _bad(
            str(file), "holds no list of rows", "a .json file is one list of objects; use .jsonl for one object a line"
        )
    for number, row in enumerate(rows, 1):
        place = f"{file}: row {number}"
        yield place, _mapping(row, place)


def _object_per_line(text: str) -> bool:
    """Whether the text is JSON lines under the ending of JSON: its first line is one whole object, and more follow."""
    first, _, rest = text.partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _parsed(text: str, file: Path, first_line: int, form: str) -> Any:
    place = f"{file}:{first_line}"
    if text.startswith("\ufeff"):
        raise _bad(place, "starts with a byte order mark", "save the file as UTF-8 without a byte order mark")
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise _bad(
            f"{file}:{first_line + error.lineno - 1}", f"is not JSON: {error.msg} at column {error.colno}", form
        ) from error
    except RecursionError as error:
        raise _bad(place, "is nested too deeply to be read", form) from error


def _csv(file: Path, delimiter: str) -> Iterator[tuple[str, Row]]:
    # Tables are read by pandas in the end, which takes a byte order mark; the csv module does not.
    reader = csv.DictReader((line.removeprefix("\ufeff") for _, line in _lines(file)), delimiter=delimiter)
    try:
        for row in reader:
            if None in row:
                message = f"has more fields than the {len(reader.fieldnames or ())} columns of the first line"
                raise _bad(f"{file}:{reader.line_num}", message, 'put text that holds a separator in "quotes"')
            yield f"{file}:{reader.line_num}", row
    except csv.Error as error:
        raise _bad(f"{file}:{reader.line_num}", f"cannot be read: {error}", "save the rows as .jsonl") from error


def _parquet(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}: row {number}", row
    except pyarrow.ArrowException as error:
        message = f"cannot be read as parquet: {str(error).partition('.')[0]}"
        raise _bad(str(file), message, "write the file again, or give the rows as .jsonl") from error


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        names = {"NoneType": "null", "bool": "true or false", "int": "a number", "float": "a number"}
        name = type(row).__name__
        raise _bad(place, f"is {names.get(name, f'a {name}')}, not an object", 'each row looks like {"column": value}')
    return row


def _bad(place: str, message: str, fix: str) -> Refused:
    return Refused(Problem(place, message, fix, Exit.DATA))


def beside(place: Path) -> str:
    """The fix for a file that is not there: one beside it with much the same name."""
    from ftcore.catalog import nearest

    names = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    near = nearest(place.name, names)
    return f"did you mean {place.parent / near}?" if near else "paths are relative to where you run ftcore"
