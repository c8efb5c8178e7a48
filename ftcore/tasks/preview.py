"""`ftcore preview`: rows exactly as the trainer gets them, trained tokens marked and counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from ftcore import hooks as h
from ftcore import pipeline
from ftcore.errors import Problem, Refused
from ftcore.report import heading, note
from ftcore.tasks._config import config_of
from ftcore.tokens import IGNORED, render

MARK = ("[[", "]]")
"""Around trained text where there are no colours."""


def main(argv: list[str]) -> int:
    """Print rows; the tokenizer is loaded, the weights are not."""
    config = config_of(argv)
    if config.preview.rows < 1:
        raise Refused(Problem("preview.rows", f"is {config.preview.rows}", "give a number above 0"))
    hooks, plan = pipeline.prepare(config)
    if plan.trainer is None:
        raise Refused(Problem("trainer", "the rows depend on the trainer, and none is selected", "add +trainer=sft"))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    dataset = hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)
    split = "eval" if plan.run.preview.eval else "train"
    if split not in dataset:
        raise Refused(Problem("preview.eval", "there are no held-out rows", "set data.eval_path or data.eval_size"))
    rows = dataset[split]
    for number, row in zip(range(1, plan.run.preview.rows + 1), rows, strict=False):
        show_row(number, row, tokenizer)
    if plan.trainer.tokenized:
        note(f"\n{summary(rows)}")
    return 0


def show_row(number: int, row: dict[str, Any], tokenizer: Any) -> None:
    """One row: token ids decoded piece by piece, or the prompt that a generator will see."""
    if "input_ids" not in row:
        heading(f"Row {number}")
        note(render(tokenizer, row["prompt"], generate=True))
        for name, value in row.items():
            if name != "prompt":
                note(f"  {name}: {value}")
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
