"""A forecast of memory is near what was measured on GPUs, and what is said to fit does."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest

from ftcore import pipeline
from ftcore.api import validated
from ftcore.cli import run as command
from ftcore.config import Memory
from ftcore.forecast import STEP, Forecast, free
from ftcore.tasks.plan import on_meta

GIB = 2**30
LORA = ("+trainer=sft", "adapter.r=16")
FULL = ("+trainer=sft", "adapter=full", "trainer.optimizer=adamw_8bit")

MEASURED = {
    "llama3.1-8b": ("llama", LORA, Memory.off, 4, 2048, 39.9),
    "llama3.1-8b, fewer rows": ("llama", LORA, Memory.off, 2, 2048, 29.7),
    "llama3.1-8b, NF4": ("llama", (*LORA, "+quantizer=bnb_nf4"), Memory.off, 4, 2048, 30.2),
    "llama3.1-8b, fp8": ("llama", (*LORA, "+quantizer=fp8"), Memory.off, 4, 2048, 39.8),
    "llama3.2-1b, all weights": ("llama", FULL, Memory.off, 4, 2048, 13.6),
    "llama3.2-1b, DPO": ("llama", LORA, Memory.least, 8, 4096, 5.97),
    "qwen3-0.6b": ("qwen3", LORA, Memory.off, 2, 1024, 3.60),
    "qwen3-1.7b": ("qwen3", LORA, Memory.off, 4, 2048, 15.3),
    "gemma3-1b": ("gemma3", LORA, Memory.off, 4, 2048, 12.3),
    "mistral-1.1b-cut": ("mistral", LORA, Memory.off, 4, 2048, 5.86),
}
"""GiB by `torch.cuda.max_memory_allocated`, of docs/benchmarks.md."""


@lru_cache(maxsize=1)
def forecast(*words: str) -> Forecast:
    hooks, plan = pipeline.prepare(validated([*words, "output_dir=nowhere"]))
    found = Forecast.of(plan, on_meta(hooks, plan)[0])
    assert isinstance(found, Forecast)
    return found


@pytest.mark.parametrize("name", MEASURED)
def test_it_is_near_what_was_measured(name: str) -> None:
    """Within 10 %."""
    family, words, memory, rows, length, measured = MEASURED[name]
    shape = f"model.shape={name.partition(',')[0]}"
    said = forecast(f"+model={family}", shape, "model.dtype=bfloat16", *words).peak(memory, rows, length) / GIB
    assert said == pytest.approx(measured, rel=0.1)


def test_what_is_said_to_fit_fits_and_no_more() -> None:
    found = forecast("+model=qwen3", "model.shape=qwen3-0.6b", *LORA)
    room = free(8)
    assert 0 < room < 8 * GIB
    lengths = []
    for memory in (Memory.off, Memory.least, Memory.offload):
        length = found.longest(memory, room)
        assert length % STEP == 0
        assert found.peak(memory, 1, length) <= room < found.peak(memory, 1, length + STEP)
        rows = found.most_rows(memory, 1024, room)
        assert found.peak(memory, rows, 1024) <= room < found.peak(memory, rows + 1, 1024)
        lengths.append(length)
    assert lengths == sorted(set(lengths)), "less kept, longer rows"
    assert found.longest(Memory.off, found.fixed) == 0
    assert found.host(1, 4096) == 28 * 2 * 4096 * 1024, "the inputs of 28 layers"


def test_the_plan_shows_it(in_tmp, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "+model=qwen3", "model.tiny=true", "+trainer=sft", "memory=least"]
    assert command([*words, "gpu_memory=8"]) == 0
    said = capsys.readouterr().out
    assert "Memory of a GPU of 8 GiB (a forecast)" in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith("  memory=")][:3] == [
        "memory=off", "memory=least", "memory=offload",
    ]  # fmt: skip
    assert command([*words, "gpu_memory=8", "adapter.dropout=0.1"]) == 0
    assert "nobody has counted" in capsys.readouterr().out
    assert command([*words, "gpu_memory=-1"]) == 2
    assert "gpu_memory: is -1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("+model=qwen3 +trainer=dpo", "one sequence a row"),
        ("+model=qwen2_vl +trainer=sft data=images", "what images take"),
    ],
)
def test_what_is_not_counted_is_said(words: str, reason: str, in_tmp, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", *words.split(), "model.tiny=true", "gpu_memory=8"]) == 0
    assert reason in capsys.readouterr().out


def test_a_teacher_is_not_counted() -> None:
    hooks, plan = pipeline.prepare(validated(["+model=qwen3", "model.tiny=true", "+trainer=sft", "output_dir=nowhere"]))
    model = on_meta(hooks, plan)[0]
    assert plan.trainer is not None
    assert isinstance(Forecast.of(plan, model), Forecast)
    taught = replace(plan, trainer=replace(plan.trainer, teacher=True))
    assert "one model" in str(Forecast.of(taught, model))
