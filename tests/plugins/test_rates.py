"""Rates of their own: the embedding and the head, and LoRA's B matrices."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ftcore import Refused
from ftcore.api import run
from ftcore.config import Optimizer, TrainerConfig
from ftcore.defaults.optimizer import ftcore_make_optimizer
from ftcore.device import Device
from ftcore.parameter_groups import parameter_groups
from ftcore.specs import Loaded
from ftcore.testing import runs
from ftcore.testing.trainer import Watched

TINY = ("+model=llama", "model.tiny=true", "model.dtype=float32", "+trainer=sft")
EMBEDDINGS = "adapter.modules_to_save=[embed_tokens,lm_head]"

Groups = Sequence[dict[str, Any]]


def settings(loaded: Loaded) -> TrainerConfig:
    assert loaded.plan.run.trainer is not None
    return loaded.plan.run.trainer


def rates(groups: Groups, model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    """Name to rate and decay of every trained parameter, each of which is in one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    given = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert sorted(name for name, _ in given) == sorted(names.values())
    return dict(given)


def test_without_rates_the_groups_are_those_of_transformers() -> None:
    from transformers import Trainer, TrainingArguments

    loaded = runs.loaded([*TINY, "adapter=full", "trainer.weight_decay=0.1"])
    trainer = Trainer(loaded.model, TrainingArguments("out", weight_decay=0.1, learning_rate=1e-3, use_cpu=True))
    ours, theirs = parameter_groups(settings(loaded), loaded.model), trainer.create_optimizer().param_groups
    assert [[id(p) for p in g["params"]] for g in ours] == [[id(p) for p in g["params"]] for g in theirs]
    assert [(g["lr"], g["weight_decay"]) for g in ours] == [(g["lr"], g["weight_decay"]) for g in theirs]
    assert [(g["lr"], g["weight_decay"]) for g in ours] == [(1e-3, 0.1), (1e-3, 0.0)]
    assert ftcore_make_optimizer(loaded.plan, loaded.model) is None, "the trainer makes it"


def test_the_embedding_and_the_head_have_their_own_rate() -> None:
    loaded = runs.loaded([*TINY, EMBEDDINGS, "trainer.embedding_learning_rate=1e-5", "trainer.weight_decay=0.1"])
    found = rates(parameter_groups(settings(loaded), loaded.model), loaded.model)
    own = {name for name, given in found.items() if given == (1e-5, 0.1)}
    path = "base_model.model.{}.modules_to_save.default.weight"
    assert own == {path.format("model.embed_tokens"), path.format("lm_head")}
    assert {given for name, given in found.items() if name not in own} == {(1e-3, 0.1)}


def test_an_embedding_that_is_the_head_too_is_stepped_once() -> None:
    words = ["+model=smollm2", *TINY[1:], "adapter=full", "trainer.embedding_learning_rate=1e-5"]
    loaded = runs.loaded(words)
    found = rates(parameter_groups(settings(loaded), loaded.model), loaded.model)
    assert [name for name, (rate, _) in found.items() if rate == 1e-5] == ["model.embed_tokens.weight"]


def test_rows_of_new_tokens_are_of_the_embedding() -> None:
    words = [*TINY, "model.new_tokens=['<a>']", "trainer.embedding_learning_rate=1e-5"]
    loaded = runs.loaded(words)
    found = rates(parameter_groups(settings(loaded), loaded.model), loaded.model)
    own = [name for name, (rate, _) in found.items() if rate == 1e-5]
    assert len(own) == 2, "of the embedding, and of a head of its own"
    assert all(".trainable_tokens_delta." in name for name in own)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_loraplus_has_the_groups_of_peft(variant: str) -> None:
    from peft.optimizers import create_loraplus_optimizer

    words = [*TINY, EMBEDDINGS, f"adapter.variant={variant}", "trainer.loraplus_ratio=16", "trainer.weight_decay=0.1"]
    loaded = runs.loaded(words)
    model: Any = loaded.model
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1
    )
    ours = rates(parameter_groups(settings(loaded), model), model)
    assert ours == rates(theirs.param_groups, model)
    assert {rate for name, (rate, _) in ours.items() if "lora_B" in name} == {1e-3 * 16}
    assert {rate for name, (rate, _) in ours.items() if "lora_A" in name} == {1e-3}


def test_both_at_once() -> None:
    words = [*TINY, EMBEDDINGS, "trainer.loraplus_ratio=4", "trainer.embedding_learning_rate=1e-5"]
    loaded = runs.loaded(words)
    found = rates(parameter_groups(settings(loaded), loaded.model), loaded.model)
    assert {rate for rate, _ in found.values()} == {1e-3, 4e-3, 1e-5}


@pytest.mark.parametrize("name", [option.value for option in Optimizer])
def test_every_optimizer_takes_them(name: str) -> None:
    words = [*TINY, EMBEDDINGS, "trainer.embedding_learning_rate=1e-5", f"trainer.optimizer={name}"]
    loaded = runs.loaded([*words, "trainer.args.adam_beta2=0.95"])
    optimizer = ftcore_make_optimizer(loaded.plan, loaded.model)
    assert optimizer is not None
    assert {group["lr"] for group in optimizer.param_groups if group["params"]} == {1e-3, 1e-5}
    assert type(optimizer).__module__.startswith("bitsandbytes") == name.endswith("8bit")
    assert [group["betas"][1] for group in optimizer.param_groups if "betas" in group] == (
        [] if name == "sgd" else [0.95] * len(optimizer.param_groups)
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, of which it only asks whether")
def test_the_own_8_bit_optimizer_takes_them() -> None:
    from ftcore_kernels.optim.choice import optimizer

    words = ["trainer.embedding_learning_rate=1e-5", "trainer.optimizer=adamw_8bit", "trainer.seed=7"]
    loaded = runs.loaded([*TINY, EMBEDDINGS, *words])
    gpu = Device()
    vars(gpu).update(kind="cuda", capability=(8, 0))  # where its cached properties are kept
    made = optimizer(replace(loaded.plan, device=gpu), loaded.model)
    assert type(made).__name__ == "AdamW8bit"
    assert type(made).__module__.startswith("ftcore_kernels")
    assert {group["rounding"] for group in made.param_groups} == {7}  # type: ignore[union-attr]
    found = rates(made.param_groups, loaded.model)  # type: ignore[union-attr]
    assert len([name for name, (rate, _) in found.items() if rate == 1e-5]) == 2


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_8bit"])
def test_a_run_steps_the_embedding_at_its_rate(optimizer: str, in_tmp: Path) -> None:
    """Adam's first steps are as long as the rate: the farthest weight shows it."""
    watched = Watched()
    words = [*TINY, *runs.SHORT, EMBEDDINGS, "trainer.max_steps=2", "trainer.warmup=0", "trainer.schedule=constant"]
    own = ["trainer.learning_rate=1e-3", "trainer.embedding_learning_rate=1e-5", f"trainer.optimizer={optimizer}"]
    run([*words, *own], plugins=[watched])
    now = dict(watched.trainer.model.named_parameters())
    moved = {name: float((now[name].detach() - was).abs().max()) for name, was in watched.before.items()}
    for part, rate in (("embed_tokens.modules_to_save", 1e-5), ("lm_head.modules_to_save", 1e-5), ("lora_B", 1e-3)):
        (farthest,) = [max(moved[name] for name in moved if part in name)]
        assert 0.5 * rate < farthest < 2.5 * rate, part


@pytest.mark.parametrize(
    ("words", "key", "fix"),
    [
        (["trainer.embedding_learning_rate=1e-5"], "trainer.embedding_learning_rate", "modules_to_save=[embed_tokens"),
        ([EMBEDDINGS, "trainer.embedding_learning_rate=0"], "trainer.embedding_learning_rate", "above 0"),
        (["trainer.loraplus_ratio=0"], "trainer.loraplus_ratio", "above 0"),
        (["adapter=full", "trainer.loraplus_ratio=16"], "trainer.loraplus_ratio", "use adapter=lora"),
    ],
)
def test_the_plan_refuses(words: list[str], key: str, fix: str) -> None:
    (problem,) = runs.refusals([*TINY, *words])
    assert problem.key == key
    assert fix in problem.fix


def test_a_saved_adapter_that_trains_no_embedding_is_refused_once_it_is_loaded(in_tmp: Path) -> None:
    runs.loaded(TINY).model.save_pretrained("saved")  # type: ignore[operator]
    loaded = runs.loaded([*TINY, "adapter.path=saved", "trainer.embedding_learning_rate=1e-5"])
    with pytest.raises(Refused, match="neither the embedding nor the head is trained"):
        ftcore_make_optimizer(loaded.plan, loaded.model)
