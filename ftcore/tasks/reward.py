"""`ftcore reward`: what rewards say to completions that are there already; no model, no tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftcore import hooks as h
from ftcore.catalog import installed
from ftcore.columns import renamed
from ftcore.config import RunConfig
from ftcore.defaults.check_data import check_rows
from ftcore.defaults.checks import requirements, reward_functions
from ftcore.device import Device
from ftcore.errors import Problem, Refused, refuse
from ftcore.manager import Hooks, selected_options
from ftcore.report import note, table
from ftcore.rewards import Guarded, guarded, text_of
from ftcore.rows import iter_rows, local_files, sources
from ftcore.specs import DataFormat, ModelFamily, Plan, TrainerSpec
from ftcore.tasks._config import config_of

EXAMPLE = "ftcore reward '+reward=[length]' data.path=answers.jsonl"
SHAPE = "judged"
SHOWN = 60
"""Characters of a completion that are shown."""


def main(argv: list[str]) -> int:
    """Print the value of every reward for every row, their sums, and the means."""
    config = config_of(argv)
    if not (config.reward or config.rewards):
        raise Refused(Problem("reward", "no reward is selected", EXAMPLE))
    if config.data is None or config.data.path is None:
        raise Refused(Problem("data.path", "there are no completions to judge", EXAMPLE))
    plan = _plan(config)
    refuse([*requirements(plan), *reward_functions(plan), *_own_checks(plan)] or [*check_rows(plan)])
    rewards = guarded(Hooks.for_run(config, installed()).collect(h.ftcore_rewards, plan=plan), config.scoring)
    columns = config.data.columns
    rows = [convert(row) for path in sources(config.data.path) for row in _rows(path, columns) if check(row) is None]
    show(rows, rewards)
    return 0


def check(row: Mapping[str, Any]) -> str | None:
    """A completion, or a conversation that ends with the assistant."""
    if isinstance(row.get("completion"), (str, list)):
        return None
    messages = row.get("messages")
    if isinstance(messages, list) and messages and messages[-1].get("role") == "assistant":
        return None
    return "has no 'completion', nor 'messages' that end with the assistant\nput the text to judge in 'completion'"


def convert(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with `prompt` and `completion` as a run gives them to rewards: lists of messages."""
    if "completion" not in row:
        *prompt, last = row["messages"]
        return {**row, "prompt": prompt, "completion": [last]}
    asked, said = row.get("prompt") or row.get("question") or "", row["completion"]
    prompt = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    completion = [{"role": "assistant", "content": said}] if isinstance(said, str) else said
    return {**row, "prompt": prompt, "completion": completion}


def show(rows: list[dict[str, Any]], rewards: list[Guarded]) -> None:
    """One line per row, then the means."""
    names = sorted({name for row in rows for name in row} - {"prompt", "completion"})
    columns = {name: [row.get(name) for row in rows] for name in names}
    prompts, completions = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    values = [reward(prompts=prompts, completions=completions, **columns) for reward in rewards]
    totals = [sum(value for value in line if value is not None) for line in zip(*values, strict=True)]
    lines = zip(range(1, len(rows) + 1), *values, totals, map(_shown, completions), strict=True)
    means = ["mean", *(_mean(one) for one in values), _mean(totals), ""]
    header = ("row", *(reward.__name__ for reward in rewards), "sum", "completion")
    table(([_cell(cell) for cell in line] for line in [*lines, means]), header=header)
    for reward in rewards:
        if reward.failed:
            note(f"{reward.__name__} failed on {reward.failed} of {reward.judged}")


def _plan(config: RunConfig) -> Plan:
    """A plan that has rewards and rows, and no model."""
    assert config.data is not None
    here = f"{__name__}:"
    rows = DataFormat(name=SHAPE, shape=SHAPE, convert=f"{here}convert", check=f"{here}check", sample="")
    return Plan(
        run=config,
        family=ModelFamily(model_types=(), roles=(), lora_targets=(), tiny={}),
        format=rows,
        trainer=TrainerSpec(accepts=frozenset({SHAPE}), wants_rewards=True),
        kernels=(),
        device=Device(),
        output_dir=Path(),
        plugins=(),
    )


def _own_checks(plan: Plan) -> Iterable[Problem]:
    """What the selected rewards say of the plan."""
    options = (option for option in selected_options(plan.run, installed()) if option.kind == "reward")
    checks = (getattr(option.load(), "ftcore_check_plan", None) for option in options)
    return [problem for own in checks if own for problem in own(plan=plan)]


def _rows(path: str, columns: Mapping[str, str]) -> Iterable[Mapping[str, Any]]:
    files = local_files(path)
    if files is None:
        raise Refused(Problem("data.path", f"there is no file {path}", "give a local file"))
    return [row for file in files for _, row in renamed(iter_rows(file), columns)]


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _cell(value: Any) -> Any:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else value


def _shown(completion: Any) -> str:
    text = " ".join(text_of(completion).split())
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."
