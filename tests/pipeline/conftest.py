"""Tiny runs, in process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import ftcore

TINY = ["+model=qwen3", "model.tiny=true"]
FEW = ["trainer.max_steps=2", "trainer.global_batch=4", "trainer.max_length=256"]


@pytest.fixture
def tiny_run(in_tmp: Path) -> Callable[..., ftcore.RunResult]:
    """Run two steps of SFT on tiny Qwen3 with more overrides."""

    def run(*words: str, plugins: tuple[object, ...] = ()) -> ftcore.RunResult:
        return ftcore.run([*TINY, "+trainer=sft", *FEW, *words], plugins=plugins)

    return run
