"""Losses and gradients of the preference trainers, with ftcore's layers and head, are TRL's in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import gradients_of, held, move, rows_of

from ftcore.testing import maths, runs

pytestmark = pytest.mark.slow  # TRL alone, in a process of its own

TEN = 1e-5
CASES: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "dpo": ("dpo", "lora", (), {}),
    "dpo_full": ("dpo", "full", ("trainer.loss_type=[ipo,robust]", "trainer.label_smoothing=0.1"),
                 {"loss_type": ["ipo", "robust"], "label_smoothing": 0.1}),
    "kto": ("kto", "lora", ("trainer.undesirable_weight=1.5",), {"undesirable_weight": 1.5}),
    "orpo": ("orpo", "lora", ("trainer.beta=0.3",), {"beta": 0.3}),
    "simpo": ("simpo", "lora", ("trainer.nll_weight=0.5",),
              {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.5}),
    "cpo": ("simpo", "lora", ("trainer.loss_type=sigmoid", "trainer.beta=0.1", "trainer.nll_weight=1"), {}),
    "reward": ("reward", "full", ("trainer.center_rewards=0.01",), {"center_rewards_coefficient": 0.01}),
}  # fmt: skip
"""Trainer, adapter, our words, and TRL's arguments for the same."""


def saved(folder: Path) -> dict[str, str]:
    """Tiny checkpoints and a trained adapter, as a user would have them."""
    base = ("+model=qwen3", "model.tiny=true", "model.dtype=float32", "kernels=[]")
    places = {name: str(folder / name) for name in ("causal", "adapter", "scored")}
    loaded = runs.loaded(base)
    runs.shake(loaded.model, trainable_only=True)
    loaded.model.save_pretrained(places["adapter"])
    loaded.model.unload().save_pretrained(places["causal"])
    scored = runs.loaded([*base, "+trainer=reward", "adapter=full"]).model
    scored.save_pretrained(places["scored"])
    for name in ("causal", "scored"):
        loaded.tokenizer.save_pretrained(places[name])
    return places


def ours(name: str, places: dict[str, str], folder: Path) -> dict[str, torch.Tensor]:
    """Our loss and gradients; what the other process needs for its own is left in the folder."""
    trainer_name, adapter, words, arguments = CASES[name]
    model = places["scored" if trainer_name == "reward" else "causal"]
    path = places["adapter"] if adapter == "lora" else None
    words = (*words, f"model.path='{model}'", "model.tiny=false", f"adapter={adapter}")
    words = (*words, f"adapter.path='{path}'") if path else words
    made = held(folder / f"run_{name}", trainer_name, *words, "trainer.global_batch=64", "trainer.micro_batch=64")
    trainer = made.trainer
    weights = move(trainer.model)
    rows = made.rows
    if trainer_name == "kto":  # in the order that it drew
        from datasets import Dataset

        rows = list(Dataset.from_list(rows).shuffle(seed=42))
    torch.save(weights, folder / f"{name}.weights")
    case = {
        "trainer": trainer_name,
        "model": model,
        "adapter": path,
        "rows": rows,
        "weights": str(folder / f"{name}.weights"),
        "arguments": {"max_length": 200, "per_device_train_batch_size": 64, **arguments},
    }
    (folder / f"{name}.json").write_text(json.dumps(case), encoding="utf-8")
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, rows_of(trainer))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(trainer.model)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("parity")
    places = saved(folder)
    mine = {name: ours(name, places, folder) for name in CASES}
    script = Path(__file__).with_name("trl_alone.py")
    done = subprocess.run([sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (mine[name], torch.load(folder / f"{name}.trl")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_trl_s(answers, name: str) -> None:
    mine, theirs = answers[name]
    assert mine.keys() == theirs.keys()
    assert len(mine) > 10
    assert sum(float(value.norm()) for key, value in theirs.items() if key != "loss") > 1e-3
    apart = {key: maths.apart(mine[key], theirs[key]) for key in mine}
    assert max(apart.values()) <= TEN, max(apart, key=apart.__getitem__)
