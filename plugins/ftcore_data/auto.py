"""Detects the format from the first rows, and asks when more than one fits: the default."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from ftcore import DataConfig, DataFormat, Problem, Refused, hookimpl
from ftcore.catalog import installed, nearest
from ftcore.errors import Exit
from ftcore.manager import import_function
from ftcore.rows import hub_rows, iter_rows, local_files, row_problem
from ftcore_data._rows import NO_COLUMN, Row

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
        return _named(config.format)
    if config.path is None:
        return _load(SAMPLE)
    rows = _first_rows(config.path, config.split)
    if not rows:
        raise Refused(Problem(config.path, "holds no rows", "give a file with at least one row", Exit.DATA))
    fitting, misfits = [], []
    for form in map(_load, config.candidates):
        check = import_function(form.check, "data")
        bad = next(((number, reason) for number, (_, row) in enumerate(rows) if (reason := check(row))), None)
        if bad is None:
            fitting.append(form)
        else:
            misfits.append((form, *bad))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = [form.name for form in fitting]
        message = f"the rows of {config.path} could be {' or '.join(names)}"
        raise Refused(Problem("data", message, f"say {' or '.join(f'data={name}' for name in names)}", Exit.DATA))
    raise Refused(_closest(rows, misfits))


def _named(name: str) -> DataFormat:
    names = [n for n in installed().names("data") if n != "auto"]
    if name not in names:
        near = nearest(name, names)
        fix = f"did you mean data.format={near}?" if near else f"formats: {', '.join(names)}"
        raise Refused(Problem("data.format", f"there is no format '{name}'", fix))
    return _load(name)


def _load(name: str) -> DataFormat:
    form: DataFormat = installed().find("data", name).load().ftcore_data_format()
    return form


def _first_rows(path: str, split: str) -> list[tuple[str, Row]]:
    files = local_files(path)
    rows = hub_rows(path, split) if files is None else (row for file in files for row in iter_rows(file))
    return list(islice(rows, LOOKED_AT))


def _closest(rows: list[tuple[str, Row]], misfits: list[tuple[DataFormat, int, str]]) -> Problem:
    """A row that breaks the format of the rows before it, or that its columns point to, is a bad row of that format."""
    form, number, reason = max(misfits, key=lambda misfit: (misfit[1], not misfit[2].startswith(NO_COLUMN)))
    if number or not reason.startswith(NO_COLUMN):
        return row_problem(rows[number][0], reason, f" (read as {form.name})")
    place, row = rows[0]
    message = f"no known format has the columns {', '.join(row)}"
    return Problem(
        place, message, "rename them, or name the format with data=NAME; `ftcore plugins data` lists them", Exit.DATA
    )
