"""What is asked of every row before it is trained on, and the rows of a file that pass it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ftcore.columns import renamed
from ftcore.config import DataConfig
from ftcore.errors import Problem
from ftcore.manager import import_function
from ftcore.media import Reach, files_of, missing, resolved
from ftcore.quarantine import Quarantine
from ftcore.readers import Row, iter_rows
from ftcore.rows import row_problem
from ftcore.specs import DataFormat

Check = Callable[[Row, Path], str | None]
"""A row and the folder that its files are named from, to why it is bad; a second line says what to do about it."""


def row_check(form: DataFormat, data: DataConfig) -> Check:
    """The format's own check, then that what the row names is there, may be read, and can be."""
    check: Callable[[Row], str | None] = import_function(form.check, "data")
    opens: Callable[[Path | bytes], str | None] | None = import_function(form.opens, "data") if form.opens else None
    reach = Reach.of(data)

    def reason(row: Row, folder: Path) -> str | None:
        if found := check(row) or missing(row, form.media, folder, reach):
            return found
        return next(filter(None, map(opens, files_of(row, form.media, folder))), None) if opens else None

    return reason


def good_rows(
    file: Path, form: DataFormat, data: DataConfig, aside: Quarantine, checked: bool
) -> Iterator[tuple[int, Row]]:
    """Number in the file, from 0, and row with whole paths, of every row that is good; `aside` takes the others.

    :param checked: the rows passed the check before, so that only those that cannot be read are bad.
    :raises Refused: for a bad row, as `aside` decides.
    """
    check = None if checked else row_check(form, data)
    read = 0

    def put(problem: Problem) -> None:
        nonlocal read
        read += 1
        aside.add(problem)
        if data.streaming:
            aside.streamed(read)

    for number, (place, row) in enumerate(renamed(iter_rows(file, put), data.columns)):
        if check and (reason := check(row, file.parent)):
            put(row_problem(place, reason))
            continue
        read += 1
        yield number, resolved(row, form.media, file.parent)


def streamed_rows(files: list[Path], form: DataFormat, data: DataConfig, aside: Quarantine) -> Iterator[dict[str, Any]]:
    """Good rows of local files, one after another, checked as they are read."""
    for file in files:
        for _, row in good_rows(file, form, data, aside, checked=False):
            yield dict(row)
