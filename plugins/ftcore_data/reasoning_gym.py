"""Puzzles that reasoning-gym makes, without end and with a scorer each: `data.task=chain_sum`; or rows made before."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftcore import DataConfig, DataFormat, Plan, Problem, Shape, hookimpl
from ftcore_data._rows import Row, missing, not_text, one_of, sample

if TYPE_CHECKING:
    from datasets import DatasetDict

REQUIRES = ("reasoning-gym>=0.1.19,<0.2",)
SAMPLE_REWARD = "reasoning_gym"
"""Reward for rows that are made, where the user names none."""
COLUMNS = ("question", "answer", "metadata")
HELD_OUT = 1_000_003
"""Between the seed of the training rows and that of the held-out ones."""


@dataclass
class Config(DataConfig):
    """What is made where no `data.path` is given."""

    task: str = "chain_sum"
    """Name of a task; `reasoning_gym.factory.DATASETS` has them all."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the task, such as `{min_terms: 2, max_terms: 3}`."""
    size: int = 500
    """Rows to make; `eval_size` counts further ones, of another seed."""
    seed: int = 42
    """Seed of the rows."""
    system: str | None = None
    """System message of every prompt, such as one that asks for `<answer>` tags."""


@hookimpl
def ftcore_data_format(config: DataConfig) -> DataFormat:
    """Shape `prompts`: the question, and what the scorer needs."""
    return DataFormat(
        name="reasoning_gym",
        shape=Shape.PROMPTS,
        convert="ftcore_data.reasoning_gym:convert",
        check="ftcore_data.reasoning_gym:check",
        sample=sample("reasoning_gym.jsonl"),
        sample_prompts=("State the final answer to the following arithmetic problem: 6 + 7 =",),
        over={"prompts": ("metadata",)},
        made=True,
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> Iterable[Problem]:
    """A task that is there, with arguments that it takes."""
    config = plan.config(Config)
    if config.path is not None:
        return []
    if config.size < 1:
        return [Problem("data.size", f"is {config.size}", "give a number of rows above 0")]
    if config.streaming:
        return [Problem("data.streaming", "rows that are made need no streaming", "leave it out; set data.size")]
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:  # the plan names the missing package already
        return []
    if config.task not in DATASETS:
        return [Problem("data.task", f"there is no task '{config.task}'", one_of(config.task, DATASETS))]
    try:
        _made(config, 1, config.seed)
    except (TypeError, AssertionError, ValueError) as error:
        return [Problem("data.options", f"{config.task} refuses them: {error}", "mend them, or leave them out")]
    return []


@hookimpl
def ftcore_load_dataset(plan: Plan) -> DatasetDict | None:
    """Makes the rows; with a `data.path`, core reads that."""
    from datasets import Dataset, DatasetDict

    config = plan.config(Config)
    if config.path is not None:
        return None
    splits = {"train": Dataset.from_list(_made(config, config.size, config.seed))}
    if config.eval_size:
        count = config.eval_size * config.size if config.eval_size < 1 else config.eval_size
        splits["eval"] = Dataset.from_list(_made(config, max(int(count), 1), config.seed + HELD_OUT))
    return DatasetDict(splits)


def check(row: Row) -> str | None:
    """A question, its answer, and the object that the scorer reads."""
    if reason := missing(row, *COLUMNS) or not_text(row, "question"):
        return reason
    try:
        metadata = _metadata(row)
    except (ValueError, SyntaxError):
        metadata = None
    if not isinstance(metadata, Mapping) or "source_dataset" not in metadata:
        return "column 'metadata' names no source_dataset\nwrite the rows as reasoning_gym gives them"
    return None


def convert(row: Row) -> dict[str, Any]:
    """The question as a conversation; the rest goes to the reward, objects as JSON."""
    asked = [{"role": "user", "content": row["question"]}]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return {"prompt": [*system, *asked], **{name: _text(row[name]) for name in COLUMNS}}


def entry_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The entry as reasoning-gym's scorers take it."""
    return {"question": row["question"], "answer": row["answer"], "metadata": _metadata(row)}


def scorer_of(entry: Mapping[str, Any]) -> Callable[[str, Mapping[str, Any]], float]:
    """The scorer of the entry's task."""
    from reasoning_gym import get_score_answer_fn

    scorer: Callable[[str, Mapping[str, Any]], float] = get_score_answer_fn(entry["metadata"]["source_dataset"])
    return scorer


def _made(config: Config, size: int, seed: int) -> list[dict[str, Any]]:
    from reasoning_gym import create_dataset

    system = {"system": config.system} if config.system else {}
    entries = create_dataset(config.task, size=size, seed=seed, **config.options)
    return [{**{name: _text(entry[name]) for name in COLUMNS}, **system} for entry in entries]


def _text(value: Any) -> str | None:
    """Objects as Python writes them: JSON has no tuples, which some scorers tell from lists, and Arrow mixes keys."""
    return value if value is None or isinstance(value, str) else repr(_plain(value))


def _plain(value: Any) -> Any:
    """Without numpy's numbers and strings."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def _metadata(row: Mapping[str, Any]) -> Any:
    value = row["metadata"]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return ast.literal_eval(value)
