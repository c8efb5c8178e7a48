"""Few steps, and when to stop: what a run of one step learns, and what early stopping goes by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftcore.api import run
from ftcore.testing import runs
from ftcore_trainers._arguments import shared

TINY = ("+model=llama", "model.tiny=true", "model.dtype=float32", "kernels=[]", "prompts=[]", "output_dir=run")


@pytest.mark.parametrize(("rows", "steps"), [(4, 1), (20, 3)])
def test_a_run_of_few_steps_by_epochs_does_not_begin_at_a_rate_of_0(rows: int, steps: int, in_tmp: Path) -> None:
    """A part for warm-up rounds down, as it does where `max_steps` says how many steps there are."""
    given = [{"text": f"The number {number}."} for number in range(rows)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    run([*TINY, "+trainer=cpt", "data.path=rows.jsonl", "trainer.packing=false", "trainer.warmup=0.2"])
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert len(rates) == steps
    assert rates[0] == max(rates) > 0


@pytest.mark.parametrize(
    ("trainer", "metric"),
    [
        ("sft", "eval_loss"),
        ("dpo", "eval_loss"),
        ("grpo", "eval_reward"),
        ("rloo", "eval_reward"),
        ("ppo", "eval_reward"),
    ],
)
def test_early_stopping_goes_by_what_is_learnt(trainer: str, metric: str) -> None:
    """The loss of a trainer on rewards is noise around a value that says nothing of them."""
    words = ["trainer.early_stopping=2", "trainer.eval_steps=1", "data.eval_size=0.5"]
    _, plan = runs.prepared([*TINY, f"+trainer={trainer}", *words])
    assert shared(plan, has_eval=True)["metric_for_best_model"] == metric


@pytest.mark.parametrize("trainer", ["grpo", "rloo", "ppo"])
def test_a_reward_that_does_not_rise_ends_the_run(trainer: str, in_tmp: Path) -> None:
    """Evaluations have it under that name: else transformers would go on to the end, with a warning."""
    Path("r.py").write_text("def same(completions, **columns):\n    return [0.5] * len(completions)\n")
    words = ["trainer.early_stopping=2", "trainer.eval_steps=1", "data.eval_size=2", "trainer.max_steps=8"]
    small = ["trainer.global_batch=4", "trainer.max_completion_length=4", "rewards=[r.py:same]"]
    group = ["trainer.num_generations=2"] if trainer != "ppo" else []
    run([*TINY, f"+trainer={trainer}", *words, *small, *group])
    assert json.loads(Path("run/run.json").read_text())["steps"] == 3
