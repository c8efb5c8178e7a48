"""A run of an earlier version goes on: what was not a key then, and what is only computed faster, is no change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from ftcore import drift
from ftcore.catalog import installed
from ftcore.config import BadRows, DataConfig, Optimizer, RunConfig, TrainerConfig
from ftcore.memory import STATE_READ
from ftcore.training_checkpoint import tree
from ftcore.training_checkpoint.trainer import SafeCheckpoints

RUN = RunConfig(data=DataConfig(name="messages"), trainer=TrainerConfig(name="sft"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a run left before rows were checked, and before there were limits for rewards."""
    record = {
        "data": {"name": "messages", "path": None},
        "trainer": {"name": "sft", "optimizer": "adamw_torch", "learning_rate": 2e-4},
        "reward": {},
        "quantizer": None,
    }
    (tmp_path / drift.RECORD).write_text(yaml.safe_dump(record), encoding="utf-8")
    return tmp_path


def changed(run: RunConfig, folder: Path) -> dict[str, object]:
    return {change.key: change.now for change in drift.of_config(run, folder)}


def test_keys_that_are_new_and_at_their_default_are_no_change(folder: Path) -> None:
    assert RUN.trainer is not None
    same = replace(RUN, trainer=replace(RUN.trainer, learning_rate=2e-4))
    assert changed(same, folder) == {}


def test_keys_that_are_new_and_set_are_one(folder: Path) -> None:
    assert RUN.data is not None
    run = replace(RUN, data=replace(RUN.data, bad_rows=BadRows.quarantine))
    assert changed(run, folder)["data.bad_rows"] == "quarantine"


@pytest.mark.parametrize("kind", ["reward", "quantizer"])
def test_a_plugin_that_was_not_there_is_one(folder: Path, kind: str) -> None:
    name = {"reward": "length", "quantizer": "bnb_nf4"}[kind]
    config = installed().find(kind, name).load().Config(name=name)
    run = replace(RUN, **{kind: {name: config} if kind == "reward" else config})
    assert any(key.startswith(f"{kind}.") for key in changed(run, folder))


@pytest.mark.parametrize(("optimizer", "same"), [(Optimizer.adamw_torch_fused, True), (Optimizer.sgd, False)])
def test_the_fused_optimizer_is_the_same_one(folder: Path, optimizer: Optimizer, same: bool) -> None:
    assert RUN.trainer is not None
    run = replace(RUN, trainer=replace(RUN.trainer, optimizer=optimizer))
    assert ("trainer.optimizer" not in changed(run, folder)) is same


@pytest.mark.parametrize(("now", "same"), [("fast", True), ("vllm", False)])
def test_the_fast_generator_draws_from_the_same_weights(folder: Path, now: str, same: bool) -> None:
    """It became the default, of runs that draw nothing as well."""
    record = yaml.safe_load((folder / drift.RECORD).read_text(encoding="utf-8"))
    record["generator"] = {"name": "transformers", "batch": 64}
    (folder / drift.RECORD).write_text(yaml.safe_dump(record), encoding="utf-8")
    run = replace(RUN, generator=installed().find("generator", now).load().Config(name=now))
    keys = [key for key in changed(run, folder) if key.startswith("generator.")]
    assert (keys == []) is same


def test_a_checkpoint_does_not_say_how_the_optimizer_steps(tmp_path: Path) -> None:
    def made(fused: bool) -> torch.optim.AdamW:
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        return torch.optim.AdamW([weight], lr=0.1 if fused else 0.2, fused=fused or None)

    old, trainer = made(False), SafeCheckpoints()
    trainer.model = torch.nn.Linear(1, 1)
    old.step()
    tree.write(tmp_path, "optimizer", old.state_dict())
    trainer.optimizer = made(True)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
    tree.write(tmp_path, "scheduler", trainer.lr_scheduler.state_dict())
    trainer._load_optimizer_and_scheduler(str(tmp_path))
    assert vars(trainer.model)[STATE_READ], "what is planned afterwards does not wait for it"
    (group,) = trainer.optimizer.param_groups
    assert group["fused"] is True
    assert group["lr"] == 0.2, "all else is the checkpoint's"
    trainer.optimizer.found_inf = torch.ones(())  # as a GradScaler gives it to an optimizer that began fused
    before = group["params"][0].clone()
    trainer.optimizer.step()
    assert torch.equal(group["params"][0], before)
