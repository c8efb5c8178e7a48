"""A run that cannot fit the GPU is refused before its weights are read, with what would fit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ftcore import pipeline, too_large
from ftcore.api import validated
from ftcore.cli import run as command
from ftcore.config import Memory
from ftcore.device import Device
from ftcore.forecast import Forecast
from ftcore.meta_model import on_meta

GIB = 2**30
LLAMA = ("+model=llama", "model.shape=llama3.1-8b", "model.dtype=bfloat16", "+trainer=sft", "output_dir=nowhere")


def gpu(memory: int) -> SimpleNamespace:
    return SimpleNamespace(
        kind="cuda", name="NVIDIA L4", memory=memory, capability=(8, 9), dtype="bfloat16", runs_triton=False
    )


def forecast(*words: str) -> Forecast:
    hooks, plan = pipeline.prepare(validated([*LLAMA, *words]))
    made = Forecast.of(plan, on_meta(hooks, plan)[0])
    assert isinstance(made, Forecast)
    return made


def test_all_weights_of_8b_on_a_small_card() -> None:
    """8.03e9 weights of two bytes, gradients as wide, and two moments as wide."""
    full = forecast("adapter=full")
    problem = too_large.found(full, 22 * GIB)
    assert problem is not None
    assert problem.message == (
        "training takes 59.8 GiB of the GPU before any row is there (weights 15.0 GiB, gradients 15.0 GiB, moments of "
        "the optimizer 29.9 GiB), and 22.0 GiB are free"
    )
    assert "smaller model" in problem.fix
    assert too_large.found(full, full.fixed) is None
    assert too_large.found(full, full.fixed - 1) is not None


@pytest.mark.parametrize(
    ("words", "memory", "needs"),
    [
        ((), Memory.auto, 15.5),  # LoRA
        ((), Memory.offload, 13.5),  # without embedding and head
        (("+quantizer=bnb_nf4",), Memory.auto, 6.1),
        (("adapter=full", "trainer.optimizer=paged_adamw_8bit"), Memory.auto, 30.0),  # whose moments may leave
    ],
)
def test_what_is_there_at_all_times(words, memory, needs) -> None:
    found = forecast(*words)
    found = replace(found, plan=replace(found.plan, run=replace(found.plan.run, memory=memory)))
    for there, fits in ((1.03 * needs, True), (0.97 * needs, False)):
        assert (too_large.found(found, int(there * GIB)) is None) is fits


def test_a_setting_that_fits_is_named() -> None:
    """And is not refused itself."""
    found = forecast("trainer.max_length=1024")
    problem = too_large.found(found, 10 * GIB)
    assert problem is not None
    assert problem.fix.startswith("set +quantizer=bnb_nf4")
    assert too_large.found(forecast("trainer.max_length=1024", "+quantizer=bnb_nf4"), 10 * GIB) is None


def test_what_an_earlier_run_left_in_the_cache_is_free(monkeypatch) -> None:
    """Or a second run in a notebook would be refused."""
    for name, found in (("mem_get_info", (3, 24)), ("memory_reserved", 20), ("memory_allocated", 5)):
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    device = Device()
    device.kind = "cuda"
    assert device.memory == 3 + 20 - 5
    device = Device()
    device.kind = "cpu"
    assert device.memory == 0


def test_a_run_ends_before_its_weights_are_read(in_tmp, monkeypatch, capsys) -> None:
    """With one message; on a CPU, and where several processes share the weights, nothing is said."""
    words = ["+model=llama", "model.tiny=true", "+trainer=sft", "trainer.max_steps=1"]
    monkeypatch.setattr(pipeline, "load", lambda *_: pytest.fail("the weights were read"))
    monkeypatch.setattr(pipeline, "Device", lambda: gpu(2**10))
    assert command(words) == 2
    said = capsys.readouterr()
    assert "model: training takes " in said.err + said.out
    assert "1.0 KiB are free" in said.err + said.out
    assert "Traceback" not in said.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(pytest.fail.Exception, match="the weights were read"):
        command(words)
