"""Rows of local files in their format's columns, read for the checks of a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftcore import Plan, Refused
from ftcore.columns import renamed
from ftcore.manager import import_function
from ftcore.media import Reach, is_link, missing, paths_of, resolved
from ftcore.rows import iter_rows, local_files, sources

Placed = tuple[str, dict[str, Any]]


def paths(plan: Plan) -> list[str]:
    """Where the training rows and the held-out rows are."""
    data, form = plan.run.data, plan.format
    assert data is not None and form is not None
    return [*sources(data.path or form.sample), *([data.eval_path] if data.eval_path else [])]


def all_local(plan: Plan) -> bool:
    """Whether every row is on this machine, and need not be streamed to be counted."""
    assert plan.run.data is not None
    return not plan.run.data.streaming and all(_files(path) is not None for path in paths(plan))


def converted(plan: Plan) -> Iterator[Placed]:
    """Place and columns of every good row of the local files: core's checks name the bad ones, links are read later."""
    form, data = plan.format, plan.run.data
    assert form is not None and data is not None
    check, convert = import_function(form.check, "data"), import_function(form.convert, "data")
    reach = Reach.of(data)
    for path in paths(plan):
        for file in _files(path) or ():
            try:
                for place, row in renamed(iter_rows(file, lambda problem: None), data.columns):
                    linked = any(map(is_link, paths_of(row, form.media)))
                    if not linked and (check(row) or missing(row, form.media, file.parent, reach)) is None:
                        yield place, convert(resolved(row, form.media, file.parent))
            except Refused:
                continue


def _files(path: str) -> Any:
    try:
        return local_files(path)
    except Refused:
        return []
