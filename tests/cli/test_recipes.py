"""Every shipped recipe makes a plan, and every sweep composes."""

from __future__ import annotations

from pathlib import Path

import pytest

import ftcore_conf
from ftcore import pipeline
from ftcore.composition import compose, typed

CONF = Path(ftcore_conf.__file__).parent
RECIPES = sorted(file.stem for file in (CONF / "recipe").glob("*.yaml"))
SWEEPS = sorted((CONF / "sweep").glob("*.yaml"))
FILES = [*sorted((CONF / "recipe").glob("*.yaml")), *SWEEPS]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_plans(name: str, in_tmp: Path) -> None:
    config = typed(compose([f"+recipe={name}", "model.tiny=true"]))
    _, plan = pipeline.prepare(config)
    assert plan.trainer is not None
    assert config.model is not None
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_yields_to_the_command_line(name: str) -> None:
    words = ["model=qwen3", "model.id=me/mine", "trainer.max_steps=3", "adapter.r=5"]
    config = typed(compose([f"+recipe={name}", *words]))
    assert config.model is not None
    assert (config.model.name, config.model.id) == ("qwen3", "me/mine")
    assert config.trainer is not None
    assert config.trainer.max_steps == 3
    assert config.adapter.r == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_head_comment_carries_the_command(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    head = "\n".join(line for line in lines if line.startswith("#"))
    assert f"+{file.parent.name}={file.stem}" in head
    assert "ftcore " in head


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_sweep_composes(file: Path) -> None:
    config = compose([f"+sweep={file.stem}", "+model=smollm2", "model.tiny=true", "+trainer=sft"])
    assert typed(config).trainer is not None
