"""Sweeps: one process, several runs, nothing global left behind."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from ftcore import cli

FEW = (
    "trainer.max_steps=2",
    "trainer.global_batch=2",
    "trainer.max_length=128",
    "prompts=[Hi]",
    "sampling.max_new_tokens=2",
)
WATCHED = (
    "transformers.models.llama",
    "transformers.models.qwen3",
    "transformers.trainer",
    "transformers.modeling_utils",
)
PACKAGES = ("peft.tuners", "peft.peft_model", "trl.trainer", *WATCHED)


def state() -> dict[str, dict[str, int]]:
    """Every name of the watched modules, and every attribute of their classes, with the identity of its value."""
    found: dict[str, dict[str, int]] = {}
    for name, module in list(sys.modules.items()):
        if not isinstance(module, ModuleType) or not name.startswith(PACKAGES):
            continue
        plain = {k: v for k, v in vars(module).items() if not k.startswith("__")}
        found[name] = {k: id(v) for k, v in plain.items() if not isinstance(v, ModuleType)}
        for value in plain.values():
            if isinstance(value, type) and value.__module__ == name:
                found[f"{name}.{value.__qualname__}"] = {
                    k: id(v) for k, v in vars(value).items() if k != "__abstractmethods__"
                }
    return found


def sweep(*words: str) -> int:
    return cli.run(["-m", "+model=smollm2,qwen3", "model.tiny=true", *FEW, *words])


@pytest.mark.slow
def test_models_and_trainers_in_one_process_leave_the_libraries_alone(in_tmp: Path) -> None:
    runs = (["+trainer=sft"], ["+trainer=grpo", "trainer.max_completion_length=4", "trainer.global_batch=4"])
    assert [sweep(*words) for words in runs] == [0, 0]  # whatever the libraries import lazily is there now
    before = state()
    assert [sweep(*words) for words in runs] == [0, 0]
    after = state()
    assert len(before) > 100
    assert not {name for name in before if before[name] != after.get(name)}


def test_a_sweep_over_a_number_leaves_a_folder_each(in_tmp: Path) -> None:
    assert (
        cli.run(["-m", "+model=smollm2", "model.tiny=true", "+trainer=sft", "trainer.learning_rate=1e-4,1e-3", *FEW])
        == 0
    )
    (folder,) = (in_tmp / "runs").iterdir()
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["0", "1"]
    rates = [(folder / job / "config.yaml").read_text() for job in ("0", "1")]
    assert "learning_rate: 0.0001" in rates[0]
    assert "learning_rate: 0.001" in rates[1]


def test_wrong_keys_of_a_sweep_are_refused_first(in_tmp: Path, capsys) -> None:
    assert sweep("+trainer=stf") == 2
    assert "did you mean" in capsys.readouterr().err
    assert sweep("+trainer=sft", "trainer.lerning_rate=1,2") == 2
    assert "did you mean trainer.learning_rate?" in capsys.readouterr().err
    assert not (in_tmp / "runs").exists() or not list((in_tmp / "runs").rglob("run.json"))


def test_runs_of_a_sweep_never_share_a_folder(in_tmp: Path, capsys) -> None:
    assert sweep("+trainer=sft", "output_dir=one") == 2
    assert "hydra.sweep.dir=" in capsys.readouterr().err
    assert list(in_tmp.iterdir()) == []


def test_what_would_stop_a_later_run_stops_the_sweep_before_the_first(in_tmp: Path, capsys) -> None:
    words = ["-m", "+model=smollm2", "model.tiny=true", "+trainer=sft", "trainer.micro_batch=2,3", *FEW]
    assert cli.run(words) == 2
    said = capsys.readouterr().err
    assert "trainer.micro_batch: 3 does not divide" in said
    assert "(in the run with trainer.micro_batch=3)" in said
    assert list(in_tmp.iterdir()) == []
