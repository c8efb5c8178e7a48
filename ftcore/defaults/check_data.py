"""Checks of the data: held-out rows where something asks for them, and every row of local files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ftcore import columns
from ftcore.config import BadRows, DataConfig
from ftcore.errors import Exit, Problem, Refused
from ftcore.manager import import_function
from ftcore.media import host_of
from ftcore.quarantine import AT_FIRST, MOST, too_many
from ftcore.row_checks import Check, row_check
from ftcore.rows import Row, all_held_out, hub_rows, iter_rows, local_files, row_problem, sources
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
    yield from _limits(data)
    if data.template is not None:
        try:
            read(data.template)
        except Refused as refused:
            yield from refused.problems


def _limits(data: DataConfig) -> Iterator[Problem]:
    """What rows may name and how much of them must be trained are said in a form that can hold."""
    if not 0 <= data.min_trained <= 1:
        yield Problem("data.min_trained", f"is {data.min_trained}", "give a part of the tokens, from 0 to 1")
    for root in data.allow_roots:
        if not Path(root).expanduser().is_dir():
            yield Problem("data.allow_roots", f"there is no folder {root}", "name a folder", Exit.MISSING_INPUT)
    for host in data.allow_hosts:
        if host_of(f"https://{host}") != host.lower() and host_of(f"http://{host}") != host.lower():
            fix = f"write 'data.allow_hosts=[{host_of(host) or 'images.example.org'}]'"
            yield Problem("data.allow_hosts", f"'{host}' is no host", fix)


def check_rows(plan: Plan) -> Iterator[Problem]:
    """The files are there, and their rows are what the format says."""
    form, data = plan.format, plan.run.data
    if form is None or data is None or plan.trainer is None:
        return
    paths = [("data.path", path) for path in (sources(data.path) if data.path is not None else ())]
    if data.eval_path and data.eval_path not in (path for _, path in paths):
        paths.append(("data.eval_path", data.eval_path))
    found = RowsFound()
    for key, path in paths:
        try:
            yield from _source(key, path, data, form, found)
        except Refused as refused:
            yield from refused.problems
    yield from found.problems(data)
    made = form.made and data.path is None
    if data.eval_size and not (data.eval_path or data.weights or made):
        yield from _split(data.eval_size, sources(data.path or form.sample), data.streaming)


def _source(key: str, path: str, data: DataConfig, form: DataFormat, found: RowsFound) -> Iterator[Problem]:
    files = local_files(path, key)
    if files is None:
        check = import_function(form.check, "data")
        rows = columns.renamed(hub_rows(path, data.split, key, data.subset), data.columns)
        found.partly = True
        yield from found.look(islice(rows, FROM_HUB), check, path, data.columns)
        return
    for name in ("split", "subset"):
        if (asked := getattr(data, name)) != getattr(DataConfig(), name):
            message = f"the local file {path} has no {name}s, so '{asked}' cannot apply"
            yield Problem(f"data.{name}", message, f"leave data.{name} out")
    found.partly |= data.streaming
    check = row_check(form, data)
    for file in files:
        readable = iter_rows(file, found.unreadable)
        rows = islice(columns.renamed(readable, data.columns), STREAMED if data.streaming else None)
        yield from found.look(rows, _beside(check, file.parent), str(file), data.columns)


def _beside(check: Check, folder: Path) -> Callable[[Row], str | None]:
    return lambda row: check(row, folder)


class RowsFound:
    """Rows that were looked at, and those among them that are bad: one problem for each thing that is wrong."""

    def __init__(self) -> None:
        self.partly = False
        """Whether there are more rows than were looked at."""
        self._read = 0
        self._bad: dict[str, list[Problem]] = {}

    def unreadable(self, problem: Problem) -> None:
        """Note a row that cannot be read."""
        self._note(problem.message, problem)

    def look(
        self,
        rows: Iterable[tuple[str, Row]],
        check: Callable[[Row], str | None],
        source: str,
        names: Mapping[str, str],
    ) -> Iterator[Problem]:
        """Check rows of one source, which is to hold some."""
        before = self._read
        for place, row in rows:
            if reason := check(row):
                self._note(reason, row_problem(place, reason, columns.own_names(reason, names)))
            else:
                self._read += 1
        if self._read == before:
            yield Problem(source, "holds no rows", "give a file with at least one row", Exit.DATA)

    def _note(self, kind: str, problem: Problem) -> None:
        self._read += 1
        self._bad.setdefault(kind, []).append(problem)

    def problems(self, data: DataConfig) -> Iterator[Problem]:
        """What is wrong, at the first row that has it; nothing where few enough rows are bad to be put aside."""
        bad = sum(map(len, self._bad.values()))
        if data.bad_rows is BadRows.quarantine and bad:
            read = max(self._read, AT_FIRST) if self.partly else self._read
            if bad <= MOST * read:
                return
            yield too_many(bad, read)
        for same in self._bad.values():
            more = f" (the same in {len(same) - 1} more rows)" if len(same) > 1 else ""
            yield replace(same[0], message=same[0].message + more)


def _split(size: float, paths: list[str], streaming: bool) -> Iterator[Problem]:
    places = [local_files(path) for path in paths]
    if None in places or (streaming and size < 1):
        return
    found = (row for files in places for file in files or () for row in iter_rows(file, lambda problem: None))
    rows = sum(1 for _ in islice(found, int(size) + 1 if streaming else None))
    held_out = math.ceil(rows * size) if size < 1 else int(size)
    if held_out >= rows:
        yield all_held_out(held_out, rows)
