"""YAML of others is data: what it says to Hydra is refused before Hydra reads it, and has no effect on a single run."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftcore.cli import run as command

COPY = "_target_: shutil.copyfile\n      src: canary\n      dst: stolen"
OURS = "# @package _global_\n"
EVIL = {
    "callbacks": OURS + f"hydra:\n  callbacks:\n    x:\n      {COPY}\n",
    "job_logging": OURS + "hydra:\n  job_logging:\n    handlers:\n      x:\n        (): shutil.copyfile\n"
    "        src: canary\n        dst: stolen\n    root:\n      handlers: [x]\n",
    "hydra_logging": OURS + "hydra:\n  hydra_logging:\n    version: 1\n    handlers:\n      x:\n"
    "        (): shutil.copyfile\n        src: canary\n        dst: stolen\n    root:\n      handlers: [x]\n",
    "launcher": OURS + "hydra:\n  launcher:\n    _target_: shutil.copyfile\n    src: canary\n    dst: stolen\n",
    "sweeper": OURS + "hydra:\n  sweeper:\n    _target_: shutil.copyfile\n    src: canary\n    dst: stolen\n",
    "params": OURS + "hydra:\n  sweeper:\n    params:\n      +hydra.callbacks.x._target_: shutil.copyfile\n",
    "package": f"# @package hydra.callbacks\nx:\n      {COPY}\n",
    "package-dots": f"# @package _global_.hydra.callbacks.x\n{COPY.replace('      ', '')}\n",
    "defaults": OURS + "defaults:\n  - override /hydra/job_logging: evil\n",
    "defaults-at": OURS + "defaults:\n  - /recipe/other@hydra.callbacks\n",
    "dotted": OURS + f"hydra.callbacks.x:\n      {COPY}\n",
    "searchpath": OURS + "hydra:\n  searchpath: [file:///tmp]\n",
    "env": OURS + "hydra:\n  job:\n    env_set:\n      PATH: /tmp\n",
    "output": OURS + "hydra:\n  output_subdir: ../../x\n",
    "target": OURS + f"trainer:\n  args:\n      {COPY}\n",
    "list": OURS + f"prompts:\n  - x:\n      {COPY}\n",
}
WORDS = (
    "+model=llama",
    "model.tiny=true",
    "+trainer=sft",
    "trainer.max_steps=1",
    "+recipe=evil",
    "--config-dir",
    "conf",
)


@pytest.fixture
def recipe(in_tmp: Path):
    (in_tmp / "conf" / "recipe").mkdir(parents=True)
    (in_tmp / "canary").write_text("the canary")

    def write(text: str, name: str = "recipe/evil.yaml") -> Path:
        file = in_tmp / "conf" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize("name", EVIL)
def test_hydra_is_never_told_by_others(name: str, recipe, capsys, in_tmp: Path) -> None:
    recipe(EVIL[name])
    assert command(["-m", *WORDS]) in (2, 65)
    said = capsys.readouterr().err
    assert "evil.yaml" in said
    assert "only ftcore and the command line may" in said
    assert not (in_tmp / "stolen").exists()
    assert not (in_tmp / "runs").exists()


@pytest.mark.parametrize("name", EVIL)
def test_a_plan_of_it_has_no_effect(name: str, recipe, capsys, in_tmp: Path) -> None:
    recipe(EVIL[name])
    command(["plan", *WORDS])
    capsys.readouterr()
    assert not (in_tmp / "stolen").exists()


def test_a_group_of_hydras_own_is_refused(recipe, capsys, in_tmp: Path) -> None:
    recipe("version: 1\n", "hydra/job_logging/none.yaml")
    recipe("# @package _global_\ntrainer:\n  seed: 7\n")
    assert command(["-m", *WORDS]) == 2
    assert "lies in a folder named hydra" in capsys.readouterr().err


def test_an_alias_bomb_is_no_danger(recipe, capsys) -> None:
    levels = "\n".join(f"a{n}: &a{n} {{{', '.join(f'k{m}: *a{n - 1}' for m in range(9))}}}" for n in range(1, 12))
    recipe("a0: &a0 {x: 1}\n" + levels + "\n")
    assert command(["-m", *WORDS]) in (2, 65)
    assert "evil.yaml" in capsys.readouterr().err


def test_folders_and_parameters_of_a_sweep_stay_open(recipe, capsys) -> None:
    text = OURS + "hydra:\n  sweep:\n    dir: mine\n  sweeper:\n    params:\n      trainer.seed: 1,2\n"
    recipe(text)
    assert command(["--cfg", "job", *WORDS]) == 0
    capsys.readouterr()
