"""After training on pairs that can be learnt, the policy prefers the chosen answer of prompts that it has not seen."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import ftcore

pytestmark = pytest.mark.slow

WORDS = ("lamp", "river", "stone", "apple", "cloud", "paper", "horse", "tower", "glass", "bread", "chair", "storm")
TRAINERS = ("dpo", "kto", "orpo", "simpo", "reward")
RATE, STEPS = 2e-3, 45


def pairs(number: int, seed: int) -> list[dict[str, Any]]:
    """What is right depends on what is asked: an answer that is always preferred gets half of the pairs wrong."""
    drawn = random.Random(seed)
    rows = []
    for _ in range(number):
        right, wrong = drawn.sample(("sun", "moon"), 2)
        asked = {"sun": "day", "moon": "night"}[right]
        rows.append({"prompt": f"{' '.join(drawn.sample(WORDS, 2))} {asked}", "chosen": right, "rejected": wrong})
    return rows


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def written(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file.name


class Measured:
    """A plugin that ranks held-out pairs before and after training."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows

    @ftcore.hookimpl(wrapper=True)
    def ftcore_train(self, trainer: Any):
        self.before = self.accuracy(trainer)
        report = yield
        self.after = self.accuracy(trainer)
        return report

    def accuracy(self, trainer: Any) -> float:
        return sum(self.margin(trainer, row) > 0 for row in self.rows) / len(self.rows)

    def margin(self, trainer: Any, row: dict[str, Any]) -> float:
        """By how much the log-probability of the chosen answer, or its score, is above the other's."""
        return self.value(trainer, row, "chosen") - self.value(trainer, row, "rejected")

    def value(self, trainer: Any, row: dict[str, Any], side: str) -> float:
        import torch

        model, tokenizer = trainer.model.eval(), trainer.processing_class
        asked = [{"role": "user", "content": row["prompt"]}]
        said = [*asked, {"role": "assistant", "content": row[side]}]
        ids = tokenizer.apply_chat_template(said, return_tensors="pt", return_dict=True)["input_ids"]
        first = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        if logits.dim() == 2:
            return float(logits.squeeze())
        logps = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return float(logps[first["input_ids"].shape[1] - 1 :].sum())


@pytest.mark.parametrize("name", TRAINERS)
def test_prefers_the_chosen_answer_of_held_out_prompts(in_tmp: Path, name: str) -> None:
    rows = pairs(96, seed=0)
    train = written(in_tmp / "train.jsonl", judged(rows) if name == "kto" else rows)
    seen = {row["prompt"] for row in rows}
    measured = Measured([row for row in pairs(60, seed=1) if row["prompt"] not in seen])
    assert len(measured.rows) >= 20
    words = ("adapter=full", "trainer.global_batch=32", "trainer.warmup=5", f"trainer.max_steps={STEPS}")
    base = ("+model=qwen3", "model.tiny=true", "model.dtype=float32", f"+trainer={name}", f"data.path={train}")
    ftcore.run([*base, *words, f"trainer.learning_rate={RATE}"], plugins=[measured])
    assert 0.2 < measured.before < 0.8
    assert measured.after >= 0.8


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(in_tmp: Path, name: str) -> None:
    words = ("trainer.max_steps=4", "trainer.global_batch=4", "trainer.micro_batch=2", "trainer.save_steps=2")
    base = ["+model=llama", "model.tiny=true", "model.dtype=float32", "adapter=full", f"+trainer={name}", *words]
    whole = ftcore.run([*base, "output_dir=whole"]).metrics
    again = ftcore.run([*base, "output_dir=again", "resume=whole/checkpoints/checkpoint-2"]).metrics
    assert again["loss_last"] == pytest.approx(whole["loss_last"], abs=1e-6)
    assert whole["loss_last"] != pytest.approx(whole["loss_first"], abs=1e-4)
