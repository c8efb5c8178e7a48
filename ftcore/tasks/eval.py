"""`ftcore eval run=RUN`: held-out rows measured before and after training; without `run`, a model as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ftcore import hooks as h
from ftcore import pipeline, splits
from ftcore.config import RunConfig
from ftcore.errors import Problem, Refused
from ftcore.manager import Hooks
from ftcore.record import TRAINED
from ftcore.report import heading, note, table
from ftcore.rewards import guarded
from ftcore.rows import local_files
from ftcore.specs import KeepsBeside, Plan
from ftcore.tasks._config import config_of
from ftcore.tasks._start import check_start, put_in_trained
from ftcore.tasks._trained import trained_config

Numbers = Mapping[str, float | None]
PREFIX = "eval_"
OF_NO_MODEL = frozenset({"runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens"})
"""What trainers report besides: it says nothing of the model."""


def main(argv: list[str]) -> int:
    """Print what the trainer measures; `eval.json` has it as well, in the run's folder or in `output_dir`."""
    config = config_of(argv)
    if config.resume.checkpoint is not None:
        raise Refused(Problem("resume", "nothing is trained here", "leave it out"))
    if config.run is not None:
        check_start(config, argv)
        trained_config(config)  # refuses a run without a trained model
    with TemporaryDirectory() as scratch:  # trainers make a folder of checkpoints, which is not to be the run's
        hooks, plan = pipeline.prepare(_measuring(config, scratch))
        dataset = _held_out(hooks, plan, config)
        measured = measure(hooks, plan, dataset, Path(config.run) if config.run else None)
    rows = getattr(dataset["eval"], "num_rows", None)  # a stream does not know
    source = config.data.eval_path if config.data else None
    heading(f"Measured on {'' if rows is None else f'{rows} '}held-out rows{f' of {source}' if source else ''}")
    show(measured, plan.trainer.measures if plan.trainer else ())
    if target := config.output_dir or config.run:
        about = {"run": config.run, "eval_path": source, "rows": rows}
        note(f"\nwritten: {write(Path(target), {**about, **measured})}")
    return 0


def _measuring(config: RunConfig, scratch: str) -> RunConfig:
    """The config without what is of no use here. Rows to train on are read only where a part of them is held out."""
    data = config.data
    if data is not None and data.eval_path:
        local_files(data.eval_path, "data.eval_path")  # a file that is not there is refused by this key
        data = replace(data, path=data.eval_path, weights=[])
    return replace(config, data=data, export={}, extra={}, output_dir=scratch)


def _held_out(hooks: Hooks, plan: Plan, config: RunConfig) -> dict[str, Any]:
    """The held-out rows as the trainer takes them, also in the place of those to train on, which it asks for.

    Raises Refused where there are none.
    """
    from datasets import DatasetDict

    if plan.trainer is None:
        fix = "add +trainer=NAME, or run=RUN; `ftcore plugins trainer` lists them"
        raise Refused(Problem("trainer", "no trainer is selected, and it is what measures", fix))
    raw = splits.read(hooks, plan)
    if "eval" not in raw:
        message = "the run held out no rows" if config.run else "there are no held-out rows"
        raise Refused(Problem("data.eval_path", message, "name a file of them: data.eval_path=held.jsonl"))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    rows = DatasetDict({"eval": raw["eval"]})
    made = splits.formatted(hooks, plan, rows, tokenizer)
    return {"train": made["eval"], "eval": made["eval"]}


def measure(hooks: Hooks, plan: Plan, dataset: Any, run: Path | None) -> dict[str, Numbers]:
    """By the trainer's own evaluation: `before` and `after` training, or `value` where there is no run."""
    from transformers import set_seed

    loaded = pipeline.load(hooks, plan)
    model, tokenizer = loaded.model, loaded.tokenizer
    generator = hooks.maybe(h.ftcore_make_generator, plan=plan, model=model, tokenizer=tokenizer)
    trainer = hooks.first(
        h.ftcore_make_trainer,
        plan=plan,
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        collator=pipeline.make_collator(hooks, plan, tokenizer),
        rewards=guarded(hooks.collect(h.ftcore_rewards, plan=plan), plan.run.scoring),
        callbacks=[],
        generator=generator,
        optimizer=None,
    )

    def numbers() -> Numbers:
        assert plan.run.trainer is not None
        set_seed(plan.run.trainer.seed)  # what is drawn at random is drawn alike before and after
        found = hooks.first(h.ftcore_evaluate, plan=plan, trainer=trainer)
        named = {name.removeprefix(PREFIX): value for name, value in found.items() if name.startswith(PREFIX)}
        return {name: _number(value) for name, value in named.items() if name not in OF_NO_MODEL}

    if run is None:
        return {"value": numbers()}
    before = numbers()
    put_in_trained(hooks, plan, model, run)
    if isinstance(trainer, KeepsBeside):
        trainer.load_beside(run / TRAINED)
    if generator is not None:
        generator.weights_changed()
    return {"before": before, "after": numbers()}


def _number(value: Any) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def show(measured: Mapping[str, Numbers], measures: Sequence[str] = ()) -> None:
    """A line for each metric.

    :param measures: Those that the trainer is about, which come first, after the loss.
    """
    found = dict.fromkeys(name for numbers in measured.values() for name in numbers)
    first = [name for name in ("loss", "reward", *measures) if name in found]
    lines = dict.fromkeys([*first, *found])
    table(
        ((name, *(_shown(numbers.get(name)) for numbers in measured.values())) for name in lines),
        header=("metric", *measured),
    )


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def write(folder: Path, outcome: Mapping[str, Any]) -> Path:
    """Write `eval.json`, or `eval-2.json` and so on where there is one: nothing is written over."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        file = folder / ("eval.json" if number == 1 else f"eval-{number}.json")
        try:
            with file.open("x", encoding="utf-8") as out:
                out.write(json.dumps(outcome, indent=2) + "\n")
        except FileExistsError:
            continue
        return file
    raise AssertionError
