"""Files of rows, read one row at a time with file and line, without torch or datasets.

Readers do not raise for a row that cannot be read: they hand a Problem to `aside` and go on with the next one. Only a
file that ends there, such as a .json list that breaks off, raises Refused.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ftcore.errors import Exit, Problem, Refused

MARK = "\ufeff"
"""Byte order mark, which editors of Windows put before UTF-8."""
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
LONGEST_FIELD = 2**27
"""Characters of a table's field; Python's own limit is 128 Ki, which a long document has."""
Row = Mapping[str, Any]
Placed = Iterator[tuple[str, Row]]
Aside = Callable[[Problem], None]
"""Takes what is wrong with a row that cannot be read."""


def stop(problem: Problem) -> NoReturn:
    """The `aside` of a run that ends at its first bad row. Raises Refused."""
    raise Refused(problem)


def iter_rows(file: Path, aside: Aside = stop) -> Placed:
    """(file:line, row) of a file.

    :param aside: called for each row that cannot be read; by default the first one raises Refused.
    :raises Refused: for a file in which nothing more can be read.
    """
    ending = file.suffix.lower()
    if ending == ".jsonl":
        yield from _jsonl(file, aside)
    elif ending == ".json":
        yield from _json(file, aside)
    elif ending in (".csv", ".tsv"):
        yield from _csv(file, "\t" if ending == ".tsv" else ",", aside)
    elif ending == ".txt":
        for number, line in _lines(file, aside):
            if line.strip():
                yield f"{file}:{number}", {"text": line.rstrip("\r\n")}
    else:
        yield from _parquet(file)


def _lines(file: Path, aside: Aside) -> Iterator[tuple[int, str]]:
    # Read bytes: a line that is not UTF-8 must be named, not end the whole file.
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                aside(_not_utf8(f"{file}:{number}", error))
                continue
            yield number, line.removeprefix(MARK) if number == 1 else line


def _not_utf8(place: str, error: UnicodeDecodeError) -> Problem:
    return _bad(place, f"is not UTF-8 (byte {error.start + 1} of the line)", "save the file as UTF-8")


def _jsonl(file: Path, aside: Aside) -> Placed:
    for number, line in _lines(file, aside):
        if not line.strip():
            continue
        place = f"{file}:{number}"
        try:
            row = _mapping(_parsed(line, file, number, "a .jsonl file has one whole JSON object in each line"), place)
            if _may_halve(line):
                _whole_characters(row, place)
        except Refused as refused:
            aside(refused.problems[0])
            continue
        yield place, row


def _json(file: Path, aside: Aside) -> Placed:
    text = "".join(line for _, line in _lines(file, stop))
    if _object_per_line(text):
        yield from _jsonl(file, aside)
        return
    rows = _parsed(text, file, 1, "a .json file is one list of objects")
    if isinstance(rows, dict) and isinstance(rows.get("data"), list):
        rows = rows["data"]
    if not isinstance(rows, list):
        fix = "a .json file is one list of objects; use .jsonl for one object a line"
        raise Refused(_bad(str(file), "holds no list of rows", fix))
    halved = _may_halve(text)
    for number, row in enumerate(rows, 1):
        place = f"{file}: row {number}"
        try:
            row = _mapping(row, place)
            if halved:
                _whole_characters(row, place)
        except Refused as refused:
            aside(refused.problems[0])
            continue
        yield place, row


def _may_halve(text: str) -> bool:
    """Whether it has JSON's escapes of halves of characters, two of which are one, such as an emoji."""
    return "\\ud" in text or "\\uD" in text


def _whole_characters(row: Row, place: str) -> None:
    """No tokenizer, and no file, takes half of a character. Raises Refused for one."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        message = f"holds half of a character ({half}), as text has that was cut within an emoji"
        raise Refused(_bad(place, message, "take it out of the row, or take the row out")) from error


def _object_per_line(text: str) -> bool:
    """Whether the text is JSON lines under the ending of JSON: its first line is one whole object, and more follow."""
    first, _, rest = text.partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _missing(word: str) -> None:
    """NaN or an infinity, which JSON has not: pandas writes a missing value so."""


def _parsed(text: str, file: Path, first_line: int, form: str) -> Any:
    place = f"{file}:{first_line}"
    try:
        return json.loads(text.rstrip(), parse_constant=_missing)
    except json.JSONDecodeError as error:
        place = f"{file}:{first_line + error.lineno - 1}"
        raise Refused(_bad(place, f"is not JSON: {error.msg} at column {error.colno}", form)) from error
    except (RecursionError, ValueError) as error:  # ValueError: a whole number of thousands of digits
        said = "is nested too deeply to be read" if isinstance(error, RecursionError) else "holds too long a number"
        raise Refused(_bad(place, said, form)) from error


def _csv(file: Path, delimiter: str, aside: Aside) -> Placed:
    unreadable: dict[int, Problem] = {}
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_FIELD))
    # Strict: else a quote that nobody closed would take the rows behind it into its field.
    reader = csv.DictReader(_table_lines(file, unreadable), delimiter=delimiter, strict=True)
    try:
        _check_names(file, reader.fieldnames or (), delimiter)
    except csv.Error as error:
        raise Refused(_unreadable(f"{file}:1", error)) from error
    done = reader.line_num
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            row, problem = {}, _unreadable(f"{file}:{done + 1}", error)
            if reader.reader.line_num > done + 1:  # where the rows behind it begin is not certain
                raise Refused(problem) from error
            unreadable.setdefault(done + 1, problem)
        if row is None:
            return
        end = reader.reader.line_num
        first = next((unreadable[n] for n in range(done + 1, end + 1) if n in unreadable), None)
        done = end
        if None in row:
            message = f"has more fields than the {len(reader.fieldnames or ())} columns of the first line"
            first = first or _bad(f"{file}:{done}", message, 'put text that holds a separator in "quotes"')
        if first is not None:
            aside(first)
            continue
        yield f"{file}:{done}", row


def _unreadable(place: str, error: csv.Error) -> Problem:
    """A row that the table's own rules do not make out, by where it begins."""
    if "unquoted" in str(error):  # of a line that ends in the middle, as on old Macs
        fix = "save the file with line ends of Unix or Windows"
        return _bad(place, "has line ends of an old kind (a bare CR)", fix)
    said = "has a quote that is not closed" if "end of data" in str(error) else f"cannot be read: {error}"
    said = "goes on behind a quote that is closed" if "expected after" in str(error) else said
    fix = 'put the whole field in "quotes", and each quote in it twice, or save the rows as .jsonl'
    return _bad(place, said, fix)


def _check_names(file: Path, names: Sequence[str], delimiter: str) -> None:
    """Each column has a name of its own. Raises Refused, also where another separator made one name of all."""
    place = f"{file}:1"
    if double := next((name for name in names if names.count(name) > 1), None):
        raise Refused(_bad(place, f"has the column '{double}' twice", "rename one of them, or take it out"))
    other = next((mark for mark in SEPARATORS if len(names) == 1 and mark != delimiter and mark in names[0]), None)
    if other:
        fix = "rename the file to .tsv" if other == "\t" else "save it as a .csv with commas"
        raise Refused(_bad(place, f"is separated by {SEPARATORS[other]}, not by {SEPARATORS[delimiter]}", fix))


def _table_lines(file: Path, unreadable: dict[int, Problem]) -> Iterator[str]:
    """Lines of a table. One that is not UTF-8 stays in, since a row may span several: it is noted in `unreadable`."""
    with file.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                unreadable[number] = _not_utf8(f"{file}:{number}", error)
                if number == 1:  # without its names no column can be read
                    raise Refused(unreadable[number]) from error
                line = raw.decode("utf-8", errors="replace")
            yield line.removeprefix(MARK) if number == 1 else line


def _parquet(file: Path) -> Placed:
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
        raise Refused(_bad(str(file), message, "write the file again, or give the rows as .jsonl")) from error


def _mapping(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        names = {"NoneType": "null", "bool": "true or false", "int": "a number", "float": "a number"}
        name = type(row).__name__
        message = f"is {names.get(name, f'a {name}')}, not an object"
        raise Refused(_bad(place, message, 'each row looks like {"column": value}'))
    return row


def _bad(place: str, message: str, fix: str) -> Problem:
    return Problem(place, message, fix, Exit.DATA)
