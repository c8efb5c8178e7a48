"""Detects the format from the first rows, and asks when more than one fits: the default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from ftcore import DataConfig, DataFormat, Problem, Refused, hookimpl
from ftcore.catalog import installed
from ftcore.errors import Exit
from ftcore.manager import import_function
from ftcore.rows import iter_rows, local_files
from ftcore_data._rows import Row

SAMPLE = "messages"
"""Format whose shipped rows are used when no data is named."""
LOOKED_AT = 20


@dataclass
class Config(DataConfig):
    """Automatic detection's settings."""

    candidates: list[str] = field(default_factory=lambda: ["messages", "sharegpt", "alpaca", "prompts", "text"])
    """Formats to try; add the name of an installed one of your own."""


@hookimpl
def ftcore_data_format(config: Config) -> DataFormat:
    """The one candidate whose check passes on the first rows."""
    if config.format:
        return _load(config.format)
    if config.path is None:
        return _load(SAMPLE)
    rows = list(islice(_rows(config), LOOKED_AT))
    fitting, reasons = [], []
    for form in map(_load, config.candidates):
        check = import_function(form.check, "data")
        place, reason = next(((p, r) for p, row in rows if (r := check(row))), ("", None))
        if reason is None:
            fitting.append(form)
        else:
            reasons.append((form, place, reason))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = [form.name for form in fitting]
        message = f"the rows of {config.path} could be {' or '.join(names)}"
        raise Refused(Problem("data", message, f"say data={names[0]} or data={names[1]}", Exit.DATA))
    raise Refused(_closest(config, rows, reasons))


def _load(name: str) -> DataFormat:
    form: DataFormat = installed().find("data", name).load().ftcore_data_format()
    return form


def _rows(config: Config) -> Iterator[tuple[str, Row]]:
    assert config.path is not None
    files = local_files(config.path)
    if files is not None:
        for file in files:
            yield from iter_rows(file)
        return
    from datasets import load_dataset

    try:
        stream = load_dataset(config.path, split=config.split, streaming=True)
    except Exception as error:  # the hub's and the network's errors are many; all mean that the rows are not to be had
        message = f"the data set {config.path} cannot be reached ({type(error).__name__})"
        raise Refused(Problem("data.path", message, "give a local file, or check the id and data.split", Exit.MISSING_INPUT)) from error
    for number, row in enumerate(stream, 1):
        yield f"{config.path} row {number}", row


def _closest(config: Config, rows: list[tuple[str, Row]], reasons: list[tuple[DataFormat, str, Any]]) -> Problem:
    """A row that breaks the format which its columns point to is a bad row, not an unknown format."""
    if not rows:
        return Problem(str(config.path), "holds no rows", code=Exit.DATA)
    for form, place, reason in reasons:
        if not reason.startswith("has no "):
            return Problem(place, f"{reason} (read as {form.name})", code=Exit.DATA)
    for form, place, reason in reasons:
        if reason.startswith("has no assistant"):
            return Problem(place, f"{reason} (read as {form.name})", code=Exit.DATA)
    place, row = rows[0]
    columns = ", ".join(row)
    return Problem(place, f"no known format has the columns {columns}", "name the format with data=NAME; `ftcore plugins data` lists them", Exit.DATA)
