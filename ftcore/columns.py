"""`data.columns`: columns of the user's rows by the names that formats read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, TypeVar

from ftcore.catalog import nearest
from ftcore.errors import Exit, Problem, Refused
from ftcore.specs import DataFormat

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows = TypeVar("Rows", Dataset, IterableDataset)

Row = Mapping[str, Any]
Columns = Mapping[str, str]
"""Name that a format reads to name in the user's rows."""
LOOKED_AT = 20
"""Rows among which a column must occur: one that may be left out need not be in the first."""


def problems(columns: Columns, has_path: bool, form: DataFormat | None) -> Iterator[Problem]:
    """What is wrong with the names themselves, whatever the rows."""
    if columns and not has_path:
        yield Problem("data.columns", "names columns of your rows, and the shipped rows are used", "set data.path")
        return
    of: dict[str, str] = {}
    for target, source in columns.items():
        if (other := of.setdefault(source, target)) != target:
            message = f"is '{source}', and so is data.columns.{other}"
            yield Problem(f"data.columns.{target}", message, "a column has one meaning: leave one of them out")
        if form and form.columns and target not in form.columns:
            near = nearest(target, form.columns)
            fix = f"did you mean data.columns.{near}?" if near else f"its columns: {', '.join(form.columns)}"
            yield Problem(f"data.columns.{target}", f"rows of the format {form.name} have no column '{target}'", fix)


def renamed(rows: Iterable[tuple[str, Row]], columns: Columns) -> Iterator[tuple[str, Row]]:
    """Place and row, by the names that formats read; other columns stay.

    Raises Refused where one is in none of the first rows, before any row is given.
    """
    rows = iter(rows)
    first = list(islice(rows, LOOKED_AT)) if columns else []
    if missing := [_missing(target, source, first) for target, source in columns.items() if _absent(source, first)]:
        raise Refused(*missing)
    return ((place, named(row, columns)) for place, row in chain(first, rows))


def _absent(source: str, rows: list[tuple[str, Row]]) -> bool:
    return bool(rows) and not any(source in row for _, row in rows)


def _missing(target: str, source: str, rows: list[tuple[str, Row]]) -> Problem:
    place, row = rows[0]
    message = f"has no column '{source}' (it has {', '.join(row) or 'none'}), which data.columns.{target} names"
    near = nearest(source, row)
    fix = f"did you mean data.columns.{target}={near}?" if near else f"set data.columns.{target} to one that it has"
    return Problem(place, message, fix, Exit.DATA)


def named(row: Row, columns: Columns) -> Row:
    """One row by the names that formats read. A column of such a name that the user did not mean is left out."""
    if not columns:
        return row
    targets = {source: target for target, source in columns.items()}
    return {targets.get(name, name): value for name, value in row.items() if name in targets or name not in columns}


def named_dataset(rows: Rows, columns: Columns) -> Rows:
    """The same of a whole data set."""
    if not columns:
        return rows
    names = rows.column_names or list(next(iter(rows)))
    targets = {source: target for target, source in columns.items() if source in names}
    kept = rows.remove_columns([name for name in names if name in columns and name not in targets])
    # In two steps, since a stream's columns cannot change places in one.
    aside = {source: f"{source} as {target}" for source, target in targets.items()}
    return kept.rename_columns(aside).rename_columns({aside[source]: target for source, target in targets.items()})


def own_names(reason: str, columns: Columns) -> str:
    """What to say behind a reason that speaks of columns: how the user's rows call them."""
    said = [f"'{source}'" for target, source in columns.items() if f"'{target}'" in reason.partition("\n")[0]]
    return f" (your {', '.join(said)})" if said else ""
