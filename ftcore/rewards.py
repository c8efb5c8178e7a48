"""Rewards as a run calls them: weighted, within a time limit, and with a counted default where one fails."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ftcore.columns import renamed
from ftcore.config import ScoringConfig
from ftcore.errors import Problem, Refused
from ftcore.manager import import_function
from ftcore.report import note
from ftcore.rows import iter_rows, local_files, sources
from ftcore.specs import Plan, Reward
from ftcore.time_limit import OutOfTime, call_within

ONE_BY_ONE = "one_by_one"
"""Attribute of a reward that judges each completion by itself, so that one that fails costs the others nothing."""
GIVEN = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})
"""What a reward is given besides the columns of the rows."""

Row = Mapping[str, Any]


def text_of(completion: Any) -> str:
    """The words of a completion, which is a string or a list of messages."""
    return completion if isinstance(completion, str) else "".join(_words(m.get("content")) for m in completion)


def _words(content: Any) -> str:
    """Of a message's content: a text, or parts, some of which are texts."""
    if isinstance(content, list):
        return "".join(_words(part.get("text") if isinstance(part, Mapping) else part) for part in content)
    return str(content or "")


def one_by_one(name: str, score: Callable[[str, Row], float | None], weight: float = 1.0) -> Reward:
    """A reward from what one completion is worth.

    :param name: What its metrics are called.
    :param score: From the completion's text and the columns of its row; None where it does not apply.
    """

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        values = [score(text_of(c), row) for c, row in zip(completions, _rows(columns, len(completions)), strict=True)]
        return [None if value is None else weight * float(value) for value in values]

    reward.__name__ = reward.__qualname__ = name
    vars(reward)[ONE_BY_ONE] = True
    return reward


def own(plan: Plan) -> list[Reward]:
    """The user's functions, `rewards=[file.py:function]`, each times its factor in `scoring.weights`."""
    weights = plan.run.scoring.weights or [1.0] * len(plan.run.rewards)
    functions = [import_function(text, "rewards") for text in plan.run.rewards]
    return [f if weight == 1 else _weighted(f, weight) for f, weight in zip(functions, weights, strict=True)]


@dataclass
class Guarded:
    """A reward that fails in no other way than by its default, and counts how often."""

    function: Reward
    scoring: ScoringConfig
    judged: int = 0
    """Completions so far."""
    failed: int = 0
    """Those of them that took the default."""
    _said: bool = False
    __name__: str = field(init=False)

    def __post_init__(self) -> None:
        self.__name__ = name_of(self.function)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One value per completion, as TRL calls rewards. Raises Refused where not one of the first ones is judged."""
        rows = len(completions)
        values: list[float | None] = []
        error = ""
        step = 1 if getattr(self.function, ONE_BY_ONE, False) else max(rows, 1)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            given = {name: _part(value, part, rows) for name, value in columns.items()}
            found, why = self._judge({"prompts": prompts[part], "completions": completions[part], **given})
            values += found
            error = error or why
        self._report(error, rows)
        return values

    def _judge(self, given: dict[str, Any]) -> tuple[list[float | None], str]:
        """Values of one call, and what went wrong, if anything did."""
        rows = len(given["completions"])
        default, limit = self.scoring.default, self.scoring.time_limit
        try:
            # A coroutine needs an event loop, and this thread may have one that runs: a notebook's does.
            waits = inspect.iscoroutinefunction(self.function)
            said = call_within(limit, _called, self.function, accepted(self.function, given), in_thread=waits)
            values = [None if value is None else float(value) for value in said]
            if len(values) != rows:
                raise ValueError(f"returned {len(values)} values for {rows} completions")
        except OutOfTime:
            values, why = [math.nan] * rows, f"took longer than scoring.time_limit={limit:g} s"
        except Exception as error:  # a user's function: it may raise anything
            values, why = [math.nan] * rows, f"raised {type(error).__name__}: {error}"
        else:
            why = "returned a value that is not finite"
        bad = [value is not None and not math.isfinite(value) for value in values]
        self.judged += rows
        self.failed += sum(bad)
        return [default if is_bad else value for is_bad, value in zip(bad, values, strict=True)], why * any(bad)

    def _report(self, error: str, rows: int) -> None:
        if not error:
            return
        if self.scoring.default is None or self.failed == self.judged:
            what = "failed" if self.scoring.default is None else f"failed on all of the first {rows} completions"
            fix = "mend it; `ftcore reward` tries it on rows, without a model"
            raise Refused(Problem(f"reward {self.__name__}", f"{what}: it {_one_line(error)}", fix))
        if not self._said:  # once; the metrics have the count
            self._said = True
            note(f"reward {self.__name__} {_one_line(error)}; such completions get {self.scoring.default:g}")


def guarded(rewards: Sequence[Reward], scoring: ScoringConfig) -> list[Guarded]:
    """Every reward of a run with its time limit and its default."""
    return [Guarded(reward, scoring) for reward in rewards]


def counted(rewards: Sequence[Guarded]) -> list[Any]:
    """The callback that logs failures, where there is anything to fail."""
    from ftcore.callbacks import FailedRewards

    return [FailedRewards(rewards)] if rewards else []


def name_of(reward: Any) -> str:
    """What the metrics of a reward are called."""
    return str(getattr(reward, "__name__", type(reward).__name__))


def accepted(function: Reward, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the function has parameters for: one with `**columns` gets all."""
    parameters = _parameters(function)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(given)
    names = {p.name for p in parameters}
    return {name: value for name, value in given.items() if name in names}


def check(plan: Plan) -> Iterator[Problem]:
    """The functions are there, their weights fit, their names differ, and the rows have the columns they ask for."""
    run = plan.run
    weights, names = run.scoring.weights, [text.rpartition(":")[2] for text in run.rewards] + list(run.reward)
    if weights and len(weights) != len(run.rewards):
        message = f"has {len(weights)} numbers for {len(run.rewards)} functions in rewards"
        yield Problem("scoring.weights", message, "give one for each of rewards; a plugin has reward.NAME.weight")
    if run.scoring.time_limit < 0:
        yield Problem("scoring.time_limit", f"is {run.scoring.time_limit:g}", "give seconds, or 0 for no limit")
    for name in sorted({name for name in names if names.count(name) > 1}):
        message = f"two rewards are called {name}, and their metrics could not be told apart"
        yield Problem("rewards", message, "give one of the functions another name")
    row = first_row(plan)
    for text in run.rewards:
        function = import_function(text, "rewards")
        needed = [p.name for p in _parameters(function) if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        if row is not None and (missing := sorted({*needed} - GIVEN - {*row})):
            message = f"{text} asks for a column '{missing[0]}', which the rows have not (they have {', '.join(row)})"
            yield Problem("rewards", message, "name a column that is there, or give the parameter a default")


def check_column(plan: Plan, name: str, column: str) -> list[Problem]:
    """A plugin's `reward.NAME.column` is a column of the rows."""
    row = first_row(plan) if plan.trainer else None
    if row is None or column in row:
        return []
    message = f"the rows have no column '{column}' (they have {', '.join(row)})"
    return [Problem(f"reward.{name}.column", message, f"name the column with the right answer: reward.{name}.column=")]


def first_row(plan: Plan) -> Row | None:
    """The first row in its format's columns; None where it is not on this machine, or is a bad one."""
    data, form = plan.run.data, plan.format
    if data is None or form is None:
        return None
    try:
        files = local_files(sources(data.path or form.sample)[0])
        _, row = next(renamed(iter_rows(files[0]), data.columns)) if files else ("", None)
    except (Refused, StopIteration):
        return None
    if row is None or import_function(form.check, "data")(row) is not None:
        return None
    converted: Row = import_function(form.convert, "data")(row)
    return converted


def _weighted(function: Reward, weight: float) -> Reward:
    def times(values: Sequence[float | None]) -> list[float | None]:
        return [None if value is None else weight * value for value in values]

    def plain(**given: Any) -> list[float | None]:
        return times(function(**accepted(function, given)))

    async def awaited(**given: Any) -> list[float | None]:
        answer: Any = function(**accepted(function, given))
        return times(await answer)

    reward: Any = awaited if inspect.iscoroutinefunction(function) else plain
    reward.__name__ = reward.__qualname__ = name_of(function)
    vars(reward).update({name: value for name, value in vars(function).items() if name == ONE_BY_ONE})
    weighted: Reward = reward
    return weighted


def _called(function: Reward, given: dict[str, Any]) -> Sequence[float | None]:
    values: Any = function(**given)
    return asyncio.run(_awaited(values)) if inspect.isawaitable(values) else values


async def _awaited(value: Any) -> Any:
    return await value


def _parameters(function: Reward) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _rows(columns: Mapping[str, Any], count: int) -> list[Row]:
    cells = partial(_cell, rows=count)
    return [{name: cells(value, number) for name, value in columns.items()} for number in range(count)]


def _cell(value: Any, number: int, rows: int) -> Any:
    return value[number] if isinstance(value, list) and len(value) == rows else value


def _part(value: Any, part: slice, rows: int) -> Any:
    return value[part] if isinstance(value, list) and len(value) == rows else value


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
