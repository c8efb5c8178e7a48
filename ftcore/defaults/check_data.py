"""Checks of the data: held-out rows where something asks for them, and every row of local files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

from ftcore import columns
from ftcore.config import DataConfig
from ftcore.errors import Exit, Problem, Refused
from ftcore.manager import import_function
from ftcore.media import files_of, missing
from ftcore.rows import Row, hub_rows, iter_rows, local_files, row_problem, sources
from ftcore.specs import DataFormat, Plan
from ftcore.templates import read

STREAMED = 1000
"""Rows of a streamed data set that are checked beforehand."""
FROM_HUB = 100
"""Rows of a data set on the hub that are checked beforehand."""


def check_evaluation(plan: Plan) -> Iterator[Problem]:
    """Held-out rows are there where something asks for them, and rows are left to train on."""
    data, form, trainer = plan.run.data, plan.format, plan.run.trainer
    if data is None or form is None or trainer is None:
        return
    offer = "set data.eval_path, or data.eval_size=0.1"
    if not (data.eval_path or data.eval_size or (data.path is None and form.sample_eval)):
        for key in ("eval_steps", "early_stopping"):
            if getattr(trainer, key) > 0:
                yield Problem(f"trainer.{key}", "there are no held-out rows to evaluate", offer)
    elif trainer.early_stopping > 0 and not trainer.eval_steps:
        yield Problem(
            "trainer.early_stopping",
            "needs evaluations while it trains",
            "set trainer.eval_steps, such as trainer.eval_steps=50",
        )
    if not 0 <= data.eval_size < math.inf or (data.eval_size > 1 and data.eval_size != int(data.eval_size)):
        yield Problem("data.eval_size", f"is {data.eval_size}", "give a fraction below 1, or a whole number of rows")
    if data.streaming and trainer.max_steps < 1:
        yield Problem("data.streaming", "a streamed data set has no known length", "set trainer.max_steps")
    if data.streaming and 0 < data.eval_size < 1 and not data.eval_path:
        yield Problem(
            "data.eval_size",
            "a streamed data set has no known length to take a part of",
            "give a number of rows, or data.eval_path",
        )


def check_sources(plan: Plan) -> Iterator[Problem]:
    """Weights fit the paths, columns are those of the format, and the chat template is there."""
    data = plan.run.data
    if data is None:
        return
    yield from columns.problems(data.columns, data.path is not None, plan.format)
    count = len(sources(data.path)) if data.path is not None else 1
    if data.weights and len(data.weights) != count:
        message = f"has {len(data.weights)} numbers for {count} {'path' if count == 1 else 'paths'}"
        yield Problem("data.weights", message, "give one for each path: 'data.path=[a.jsonl,b.jsonl]'")
    elif data.weights and not all(0 < weight < math.inf for weight in data.weights):
        yield Problem("data.weights", f"is {data.weights}", "give numbers above 0")
    if data.template is not None:
        try:
            read(data.template)
        except Refused as refused:
            yield from refused.problems


def check_rows(plan: Plan) -> Iterator[Problem]:
    """The files are there, and their rows are what the format says."""
    form, data = plan.format, plan.run.data
    if form is None or data is None or plan.trainer is None:
        return
    paths = [("data.path", path) for path in (sources(data.path) if data.path is not None else ())]
    if data.eval_path and data.eval_path not in (path for _, path in paths):
        paths.append(("data.eval_path", data.eval_path))
    for key, path in paths:
        try:
            yield from _source(key, path, data, form)
        except Refused as refused:
            yield from refused.problems
    made = form.made and data.path is None
    if data.eval_size and not (data.eval_path or data.streaming or data.weights or made):
        yield from _split(data.eval_size, sources(data.path or form.sample))


def _source(key: str, path: str, data: DataConfig, form: DataFormat) -> Iterator[Problem]:
    check = import_function(form.check, "data")
    files = local_files(path, key)
    if files is None:
        found = columns.renamed(hub_rows(path, data.split, key, data.subset), data.columns)
        yield from _rows(islice(found, FROM_HUB), check, path, data.columns)
        return
    for name in ("split", "subset"):
        if (asked := getattr(data, name)) != getattr(DataConfig(), name):
            message = f"the local file {path} has no {name}s, so '{asked}' cannot apply"
            yield Problem(f"data.{name}", message, f"leave data.{name} out")
    for file in files:
        rows = islice(columns.renamed(iter_rows(file), data.columns), STREAMED if data.streaming else None)
        yield from _rows(rows, partial(_checked, check=check, form=form, folder=file.parent), str(file), data.columns)


def _checked(row: Row, check: Callable[[Row], str | None], form: DataFormat, folder: Path) -> str | None:
    reason = check(row) or missing(row, form.media, folder)
    if reason or form.opens is None:
        return reason
    opens: Callable[[Path | bytes], str | None] = import_function(form.opens, "data")
    return next(filter(None, map(opens, files_of(row, form.media, folder))), None)


def _rows(
    rows: Iterable[tuple[str, Row]], check: Callable[[Row], str | None], source: str, names: Mapping[str, str]
) -> Iterator[Problem]:
    """One problem for each thing that is wrong, at the first row that has it."""
    empty = True
    bad: dict[str, list[str]] = {}
    for place, row in rows:
        empty = False
        if reason := check(row):
            bad.setdefault(reason, []).append(place)
    for reason, places in bad.items():
        more = f" (the same in {len(places) - 1} more rows)" if len(places) > 1 else ""
        yield row_problem(places[0], reason, columns.own_names(reason, names) + more)
    if empty:
        yield Problem(source, "holds no rows", "give a file with at least one row", Exit.DATA)


def _split(size: float, paths: list[str]) -> Iterator[Problem]:
    places = [local_files(path) for path in paths]
    if None in places:
        return
    rows = sum(1 for files in places for file in files or () for _ in iter_rows(file))
    held_out = math.ceil(rows * size) if size < 1 else int(size)
    if held_out >= rows:
        message = f"holds out {held_out} of {rows} rows, which leaves none to train on"
        yield Problem("data.eval_size", message, "give a smaller number, or set data.eval_path")
