"""Checks of the data: held-out rows where something asks for them, and every row of local files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from ftcore.config import DataConfig
from ftcore.errors import Exit, Problem, Refused
from ftcore.manager import import_function
from ftcore.rows import Row, hub_rows, iter_rows, local_files, row_problem
from ftcore.specs import Plan

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


def check_rows(plan: Plan) -> Iterator[Problem]:
    """The files are there, and their rows are what the format says."""
    form, data = plan.format, plan.run.data
    if form is None or data is None or plan.trainer is None:
        return
    check = import_function(form.check, "data")
    for key, path in (("data.path", data.path), ("data.eval_path", data.eval_path)):
        try:
            files = local_files(path, key) if path else []
            if files is None:
                assert path is not None
                yield from _rows(islice(hub_rows(path, data.split, key), FROM_HUB), check, path)
            elif files and data.split != DataConfig().split:
                yield Problem("data.split", f"the local file {path} has no splits", "leave data.split out")
            for file in files or ():
                yield from _rows(islice(iter_rows(file), STREAMED if data.streaming else None), check, str(file))
        except Refused as refused:
            yield from refused.problems
    if data.eval_size and not (data.eval_path or data.streaming):
        yield from _split(data.eval_size, data.path or form.sample)


def _rows(rows: Iterable[tuple[str, Row]], check: Callable[[Row], str | None], source: str) -> Iterator[Problem]:
    """One problem for each thing that is wrong, at the first row that has it."""
    empty = True
    bad: dict[str, list[str]] = {}
    for place, row in rows:
        empty = False
        if reason := check(row):
            bad.setdefault(reason, []).append(place)
    for reason, places in bad.items():
        yield row_problem(places[0], reason, f" (the same in {len(places) - 1} more rows)" if len(places) > 1 else "")
    if empty:
        yield Problem(source, "holds no rows", "give a file with at least one row", Exit.DATA)


def _split(size: float, path: str) -> Iterator[Problem]:
    files = local_files(path)
    if files is None:
        return
    rows = sum(1 for file in files for _ in iter_rows(file))
    held_out = math.ceil(rows * size) if size < 1 else int(size)
    if held_out >= rows:
        message = f"holds out {held_out} of {rows} rows, which leaves none to train on"
        yield Problem("data.eval_size", message, "give a smaller number, or set data.eval_path")
