"""Detects the format from the first rows, and asks when more than one fits: the default."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

from ftcore import DataConfig, DataFormat, Problem, Refused, hookimpl
from ftcore.catalog import installed, nearest
from ftcore.columns import own_names, renamed
from ftcore.config import BadRows
from ftcore.errors import Exit
from ftcore.manager import import_function
from ftcore.readers import stop
from ftcore.rows import hub_rows, iter_rows, local_files, row_problem, sources
from ftcore_data._rows import OTHER_FORMAT, Row

SAMPLE = "messages"
"""Format whose shipped rows are used when no data is named."""
LOOKED_AT = 20
FORMATS = (
    "messages",
    "tools",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "prompts",
    "preference",
    "unpaired",
    "stepwise",
    "images",
    "audio",
    "codes",
    "labels",
    "pairs",
    "tokens",
    "text",
)

Placed = tuple[str, Row]


@dataclass
class Config(DataConfig):
    """Automatic detection's settings."""

    candidates: list[str] = field(default_factory=lambda: list(FORMATS))
    """Formats to try; add the name of an installed one of your own."""


@hookimpl
def ftcore_data_format(config: Config) -> DataFormat:
    """The one candidate whose check passes on the first rows, of every path."""
    if config.format:
        return _named(config.format)
    if config.path is None:
        return _load(SAMPLE)
    forms = [_load(name) for name in config.candidates]
    found = {path: _detect(path, config, forms) for path in sources(config.path)}
    names = {form.name for form in found.values()}
    if len(names) > 1:
        each = ", ".join(f"{path} as {form.name}" for path, form in found.items())
        fix = "bring the rows of all paths into one format"
        raise Refused(Problem("data.path", f"the paths hold rows of several formats: {each}", fix, Exit.DATA))
    return next(iter(found.values()))


def _detect(path: str, config: Config, forms: list[DataFormat]) -> DataFormat:
    rows = _first_rows(path, config)
    if not rows:
        raise Refused(Problem(path, "holds no rows", "give a file with at least one row", Exit.DATA))
    if config.bad_rows is BadRows.quarantine:  # a row that no format takes says nothing about the others
        checks = [import_function(form.check, "data") for form in forms]
        rows = [placed for placed in rows if any(check(placed[1]) is None for check in checks)] or rows
    misfits = [(form, *bad) for form in forms if (bad := _first_misfit(form, rows)) is not None]
    fitting = [form for form in forms if form.name not in {misfit[0].name for misfit in misfits}]
    # A format that a row's columns point to is meant, even where the row is a bad one of it.
    others = {form.name: reason for form, _, reason in misfits if reason.startswith(OTHER_FORMAT)}
    over = {general for form in forms if form.name not in others for general in _covered(form, rows)}
    fitting = [form for form in fitting if form.name not in over]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = [form.name for form in fitting]
        message = f"the rows of {path} could be {' or '.join(names)}"
        raise Refused(Problem("data", message, f"say {' or '.join(f'data={name}' for name in names)}", Exit.DATA))
    raise Refused(_closest(rows, [misfit for misfit in misfits if misfit[0].name not in over], config))


def _first_misfit(form: DataFormat, rows: list[Placed]) -> tuple[int, str] | None:
    check = import_function(form.check, "data")
    return next(((number, reason) for number, (_, row) in enumerate(rows) if (reason := check(row))), None)


def _covered(form: DataFormat, rows: list[Placed]) -> set[str]:
    """The more general formats that the rows are not of, since they have columns that only this one reads."""
    return {
        general
        for general, columns in form.over.items()
        if any(row.get(name) is not None for _, row in rows for name in columns)
    }


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


def _first_rows(path: str, config: Config) -> list[Placed]:
    files = local_files(path)
    if files is None:
        rows = hub_rows(path, config.split, subset=config.subset)
    else:
        aside = _forget if config.bad_rows is BadRows.quarantine else stop
        rows = (row for file in files for row in iter_rows(file, aside))
    return list(islice(renamed(rows, config.columns), LOOKED_AT))


def _forget(problem: Problem) -> None:
    """A row that cannot be read is put aside where the rows are checked."""


def _closest(rows: list[Placed], misfits: list[tuple[DataFormat, int, str]], config: Config) -> Problem:
    """A row that breaks the format of the rows before it, or that its columns point to, is a bad row of that format."""
    form, number, reason = max(misfits, key=lambda misfit: (misfit[1], not misfit[2].startswith(OTHER_FORMAT)))
    if number or not reason.startswith(OTHER_FORMAT):
        return row_problem(rows[number][0], reason, f"{own_names(reason, config.columns)} (read as {form.name})")
    place, row = rows[0]
    message = f"no known format has the columns {', '.join(row)}"
    known = {name for form, _, _ in misfits for name in form.columns}
    slips = ((target, nearest(target, known)) for target in config.columns if target not in known)
    meant = next((f"did you mean data.columns.{near} for data.columns.{target}?" for target, near in slips if near), "")
    fix = "say what they are: data.columns.NAME=YOURS; `ftcore plugins data` lists the formats that data=NAME selects"
    return Problem(place, message, meant or fix, Exit.DATA)
