"""Losses and gradients of RLOO and GRPO, with ftcore's layers and head, are those of TRL in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import gradients_of, held, move

from ftcore.testing import maths, runs

pytestmark = pytest.mark.slow  # TRL alone, in a process of its own

TEN = 1e-5
CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "rloo": ("rloo", ("trainer.beta=0",), {"beta": 0.0}),
    "grpo": ("grpo", ("trainer.loss_type=grpo", "trainer.beta=0.2"), {"loss_type": "grpo", "beta": 0.2}),
    "bnpo": ("grpo", ("trainer.loss_type=bnpo",), {"loss_type": "bnpo"}),
    "dr_grpo": ("grpo", ("trainer.loss_type=dr_grpo",), {"loss_type": "dr_grpo"}),
    "dapo": ("grpo", ("+trainer.args.epsilon_high=0.28",), {"epsilon_high": 0.28}),
    "gspo": ("grpo", ("trainer.loss_type=grpo", "trainer.importance_sampling_level=sequence"),
             {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
}  # fmt: skip
"""Trainer, our words, and TRL's arguments for the same."""


def saved(folder: Path) -> tuple[str, str]:
    """A tiny checkpoint and an adapter, as a user would have them."""
    loaded = runs.loaded(["+model=qwen3", "model.tiny=true", "model.dtype=float32", "kernels=[]"])
    runs.shake(loaded.model, trainable_only=True)
    loaded.model.save_pretrained(folder / "adapter")
    loaded.model.unload().save_pretrained(folder / "causal")
    loaded.tokenizer.save_pretrained(folder / "causal")
    return str(folder / "causal"), str(folder / "adapter")


def batch(trainer: str) -> dict[str, torch.Tensor]:
    """Four completions of unequal length, two to a prompt, that an older policy wrote."""
    drawn = torch.Generator().manual_seed(5)
    prompts, completions = (torch.randint(0, 256, (4, n), generator=drawn) for n in (6, 8))
    mask = (torch.arange(8) < torch.tensor([[8], [3], [5], [1]])).long()
    prompt_mask = (torch.arange(6) >= torch.tensor([[0], [0], [2], [2]])).long()
    old = -5.5 + 0.3 * torch.randn(4, 8, generator=drawn)
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": completions,
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.7]),
    }
    if trainer == "rloo":
        return inputs | {"old_logps": (old * mask).sum(1)}
    other = old + 0.2 * torch.randn(4, 8, generator=drawn)
    return inputs | {"old_per_token_logps": old, "ref_per_token_logps": other, "num_items_in_batch": mask.sum()}


def ours(name: str, model: str, adapter: str, folder: Path) -> dict[str, torch.Tensor]:
    """Our loss and gradients; what the other process needs for its own is left in the folder."""
    trainer, words, arguments = CASES[name]
    common = {"temperature": 0.8, "num_generations": 2, "max_completion_length": 8}
    words = (*words, *(f"trainer.{key}={value}" for key, value in common.items()), f"adapter.path='{adapter}'")
    words = (*words, f"model.path='{model}'", "model.tiny=false", "trainer.global_batch=4", "trainer.micro_batch=4")
    made = held(folder / f"run_{name}", trainer, *words).trainer
    case = {
        "trainer": trainer.upper(),
        "model": model,
        "adapter": adapter,
        "weights": move(made.model),
        "inputs": batch(trainer),
        "arguments": {"per_device_train_batch_size": 4, **common, **arguments},
    }
    torch.save(case, folder / f"{name}.case")
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    loss = made.compute_loss(made.model, batch(trainer))
    loss.backward()
    return {"loss": loss.detach(), **gradients_of(made.model)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("parity")
    model, adapter = saved(folder)
    mine = {name: ours(name, model, adapter, folder) for name in CASES}
    script = Path(__file__).with_name("trl_rollouts_alone.py")
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


def test_the_cases_differ(answers) -> None:
    """Each option reaches the loss."""
    losses = {name: mine["loss"].item() for name, (mine, _) in answers.items()}
    assert len({round(loss, 5) for loss in losses.values()}) == len(losses), losses
