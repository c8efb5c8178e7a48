"""The rows that both sides train on: ftcore's shipped samples, tokenized once."""

from __future__ import annotations

import random
from typing import Any

FORMATS = ("messages", "alpaca", "sharegpt", "text")
"""Data formats whose shipped rows are taken, held-out ones included."""
IGNORED = -100

Row = dict[str, list[int]]
Batch = dict[str, list[list[int]]]


def prepared(tiny: bool, length: int) -> dict[str, Any]:
    """Checkpoint folder, pad token and tokenized rows, by ftcore; a side needs no more than this."""
    from ftcore import checkpoint, pipeline
    from ftcore import hooks as h
    from ftcore.api import validated

    found: list[Row] = []
    for name in FORMATS:
        words = ["+model=smollm2", f"model.tiny={str(tiny).lower()}", f"data={name}", "+trainer=sft"]
        hooks, plan = pipeline.prepare(validated([*words, f"trainer.max_length={length}"]))
        tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
        raw = hooks.first(h.ftcore_load_dataset, plan=plan)
        for split in hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer).values():
            found += [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in split]
    assert plan.run.model is not None
    folder = checkpoint.locate(plan.run.model, plan.family)
    return {"folder": folder, "pad": tokenizer.pad_token_id, "rows": found}


def batches(rows: list[Row], pad: int, seed: int, steps: int, size: int) -> list[Batch]:
    """Epochs in an order that the seed decides, in batches padded to their longest row."""
    order: list[Row] = []
    shuffle = random.Random(seed)
    while len(order) < steps * size:
        order += shuffle.sample(rows, len(rows))
    return [padded(order[step * size : (step + 1) * size], pad) for step in range(steps)]


def padded(rows: list[Row], pad: int) -> Batch:
    """Rows of one length, padding on the right, which is neither attended to nor trained."""
    longest = max(len(row["input_ids"]) for row in rows)
    found: Batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        real, rest = len(row["input_ids"]), longest - len(row["input_ids"])
        found["input_ids"].append(row["input_ids"] + [pad] * rest)
        found["attention_mask"].append([1] * real + [0] * rest)
        found["labels"].append(row["labels"] + [IGNORED] * rest)
    return found
