"""`ftcore preview`: rows exactly as the trainer gets them, trained tokens marked and counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from ftcore import hooks as h
from ftcore import pipeline, splits
from ftcore.chat import render
from ftcore.config import TrainerConfig
from ftcore.defaults.check_data import check_rows
from ftcore.errors import Problem, Refused, refuse
from ftcore.report import heading, note
from ftcore.specs import Plan, Shape, TrainerSpec
from ftcore.tasks._config import config_of
from ftcore.tokens import IGNORED, TOKENIZED

MARK = ("[[", "]]")
"""Around trained text where there are no colours."""


def main(argv: list[str]) -> int:
    """Print rows; the tokenizer is loaded, the weights are not."""
    config = config_of(argv)
    if config.preview.rows < 1:
        raise Refused(Problem("preview.rows", f"is {config.preview.rows}", "give a number above 0"))
    hooks, plan = pipeline.prepare(config)
    if plan.trainer is None:
        plan = _without_trainer(plan)
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = splits.read(hooks, plan)
    dataset = splits.formatted(hooks, plan, raw, tokenizer)
    split = "eval" if plan.run.preview.eval else "train"
    if split not in dataset:
        raise Refused(Problem("preview.eval", "there are no held-out rows", "set data.eval_path or data.eval_size"))
    rows = dataset[split]
    if plan.run.data and plan.run.data.columns:
        note("columns: " + ", ".join(f"{name} is your {own}" for name, own in plan.run.data.columns.items()))
    for number, row in zip(range(1, plan.run.preview.rows + 1), rows, strict=False):
        show_row(number, row, tokenizer)
    assert plan.trainer is not None and plan.run.data is not None
    if plan.trainer.tokenized and not plan.run.data.streaming:
        note(f"\n{summary(rows)}")
    return 0


def _without_trainer(plan: Plan) -> Plan:
    """The plan as any trainer that takes the rows would have it, so that rows can be looked at before one is chosen.

    Raises Refused when no format is selected, or when rows are bad.
    """
    if plan.format is None:
        raise Refused(Problem("data", "no format is selected", "use data=auto"))
    shape = plan.format.shape
    tokenized = shape in TOKENIZED or (shape == Shape.IMAGES and plan.family.vision is not None)
    tokenized = tokenized or shape in plan.family.row_tokenizers
    spec = TrainerSpec(accepts=frozenset({shape}), tokenized=tokenized)
    plan = replace(plan, run=replace(plan.run, trainer=TrainerConfig()), trainer=spec)
    refuse([*check_rows(plan)])
    return plan


def show_row(number: int, row: dict[str, Any], tokenizer: Any) -> None:
    """One row: token ids decoded piece by piece, or what a trainer is given that makes the tokens itself."""
    if "input_ids" not in row:
        heading(f"Row {number}")
        for name, value in row.items():
            note(f"  {name}: {_shown(value)}")
        if _is_conversation(row.get("prompt")):
            note(render(tokenizer, row["prompt"], generate=True, tools=row.get("tools")))
        return
    ids, labels = row["input_ids"], row["labels"]
    trained = sum(label != IGNORED for label in labels)
    heading(f"Row {number}: {len(ids)} tokens, {trained} trained ({trained / len(ids):.0%})")
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        text = Text()
        for piece, is_trained in pieces(ids, labels, tokenizer):
            text.append(piece, style="bold green" if is_trained else "dim")
        Console().print(text, soft_wrap=True)
    else:
        note(
            "".join(
                f"{MARK[0]}{piece}{MARK[1]}" if is_trained else piece
                for piece, is_trained in pieces(ids, labels, tokenizer)
            )
        )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _shown(value: Any) -> str:
    """A value in one line: turns as `role: words`, media as what they are, not as their bytes."""
    if _is_conversation(value):
        return " | ".join(f"{m['role']}: {m.get('content') or m.get('tool_calls')}" for m in value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Runs of trained and of untrained tokens, as text."""
    pairs = zip(ids, labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        yield tokenizer.decode([token for token, _ in run], skip_special_tokens=False), trained


def summary(rows: Any) -> str:
    """Rows, tokens and the trained part, over the whole split."""
    lengths = [(len(row["input_ids"]), sum(label != IGNORED for label in row["labels"])) for row in rows]
    tokens, trained = sum(n for n, _ in lengths), sum(n for _, n in lengths)
    longest = max(n for n, _ in lengths)
    part = f"{trained:,} trained ({trained / tokens:.0%})"
    return f"{len(lengths)} rows, {tokens:,} tokens, {part}, longest row {longest}"
