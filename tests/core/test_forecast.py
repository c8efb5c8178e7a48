"""A forecast of memory and time is near what was measured on GPUs, and what is said to fit does."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import pytest

from ftcore import pipeline
from ftcore.api import validated
from ftcore.cards import called
from ftcore.cli import run as command
from ftcore.config import Memory
from ftcore.forecast import STEP, WORKSPACES, Forecast, free
from ftcore.meta_model import on_meta
from ftcore.specs import Passes
from ftcore.step_time import Pace
from ftcore.store import sizes

GIB = 2**30
R16 = "adapter.r=16"
LORA = ("+trainer=sft", R16)
FULL = ("+trainer=sft", "adapter=full", "trainer.optimizer=adamw_8bit")
NF4 = (*LORA, "+quantizer=bnb_nf4")
NF4_R32 = ("+trainer=sft", "adapter.r=32", "+quantizer=bnb_nf4")
HOST = "host_memory=123.5"


class Row(NamedTuple):
    """Of docs/benchmarks.md."""

    family: str
    words: tuple[str, ...]
    memory: Memory
    rows: int
    length: int
    peak: float | None
    """GiB by `torch.cuda.max_memory_allocated`."""
    rate: float | None
    """Tokens a second."""
    card: str = "H100 SXM"


MEASURED = {
    "llama3.1-8b": Row("llama", LORA, Memory.off, 4, 2048, 39.9, 17_048),
    "llama3.1-8b, least": Row("llama", LORA, Memory.least, 4, 2048, None, 13_152),  # its peak is of before the tiles
    "llama3.1-8b, fewer rows": Row("llama", LORA, Memory.off, 2, 2048, 29.7, 16_877),
    "llama3.1-8b, NF4": Row("llama", NF4, Memory.off, 4, 2048, 30.2, 16_574),
    "llama3.1-8b, NF4 under 9.7 GiB": Row("llama", NF4, Memory.least, 4, 2048, None, 13_031),
    "llama3.1-8b, fp8": Row("llama", (*LORA, "+quantizer=fp8"), Memory.off, 4, 2048, 39.8, None),
    "llama3.2-1b, all weights": Row("llama", FULL, Memory.off, 4, 2048, 13.6, 61_724),
    "llama3.2-1b, DPO": Row("llama", ("+trainer=dpo", R16), Memory.least, 4, 4096, 5.97, 47_285, "H200"),
    "llama3.2-1b, KTO": Row("llama", ("+trainer=kto", R16), Memory.least, 8, 4096, 5.97, 31_702, "H200"),
    "llama3.2-1b, GRPO": Row("llama", ("+trainer=grpo", R16), Memory.least, 8, 4096, 5.96, 60_224, "H200"),
    "qwen3-0.6b": Row("qwen3", LORA, Memory.off, 2, 1024, 3.60, 84_713),
    "qwen3-1.7b": Row("qwen3", LORA, Memory.off, 4, 2048, 15.3, 56_824),
    "gemma3-1b": Row("gemma3", LORA, Memory.off, 4, 2048, 12.3, 82_382),
    "qwen3-0.6b, all weights": Row("qwen3", FULL, Memory.least, 4, 4096, 4.44, None),
    "qwen3-0.6b, NF4 offloaded": Row("qwen3", (*NF4, HOST), Memory.offload, 1, 32_768, 2.48, None),
    "gemma3-1b, all weights": Row("gemma3", FULL, Memory.least, 4, 4096, 7.01, None),
    "llama3.1-8b, a long row": Row("llama", (*NF4_R32, HOST), Memory.offload, 1, 65_536, 9.80, 5302, "H200"),
    "llama3.1-8b, the longest": Row("llama", (*NF4_R32, HOST), Memory.offload, 1, 400_000, 26.7, 986, "H200"),
    "mistral-1.1b-cut": Row("mistral", LORA, Memory.off, 4, 2048, 5.86, 131_793, "H200"),
}


@lru_cache(maxsize=1)
def forecast(*words: str) -> Forecast:
    hooks, plan = pipeline.prepare(validated([*words, "output_dir=nowhere"]))
    found = Forecast.of(plan, on_meta(hooks, plan)[0])
    assert isinstance(found, Forecast)
    return found


@pytest.mark.parametrize("name", MEASURED)
def test_it_is_near_what_was_measured(name: str) -> None:
    """Memory within 10 %, and no more than 5 % below; time within 10 %."""
    row = MEASURED[name]
    shape = f"model.shape={name.partition(',')[0]}"
    found = forecast(f"+model={row.family}", shape, "model.dtype=bfloat16", *row.words)
    # Completions were given in the measurement.
    found = replace(found.instead(global_batch=row.rows), passes=replace(found.passes, written=0))
    if row.peak is not None:
        assert -0.05 <= found.peak(row.memory, row.rows, row.length) / GIB / row.peak - 1 <= 0.1
    if row.rate is not None:
        card = called(row.card)
        assert card is not None
        assert Pace(found, card).rate(row.memory, row.rows, row.length) == pytest.approx(row.rate, rel=0.1)


def test_what_is_said_to_fit_fits_and_no_more() -> None:
    found = forecast("+model=qwen3", "model.shape=qwen3-0.6b", *LORA)
    room = free(8)
    assert 0 < room < 8 * GIB
    lengths = []
    for memory in (Memory.off, Memory.least, Memory.offload):
        length = found.longest(memory, room)
        assert length % STEP == 0
        assert found.peak(memory, 1, length, room) <= room < found.peak(memory, 1, length + STEP, room)
        rows = found.most_rows(memory, 1024, room)
        assert found.peak(memory, rows, 1024, room) <= room < found.peak(memory, rows + 1, 1024, room)
        lengths.append(length)
    assert lengths == sorted(set(lengths)), "less kept, longer rows"
    assert found.longest(Memory.off, found.fixed) == 0
    assert found.host(Memory.offload, 1, 4096) == 26 * 2 * 4096 * 1024, "the inputs of all layers but two"
    assert found.host(Memory.least, 1, 4096) == 0


def instead(found: Forecast, **run: object) -> Forecast:
    return replace(found, plan=replace(found.plan, run=replace(found.plan.run, **run)))


def test_auto_keeps_what_a_limit_admits() -> None:
    """Everything where that fits, then tiles, then less of the layers; never more memory than there is."""
    found = forecast("+model=qwen3", "model.shape=qwen3-0.6b", *LORA)
    off, least = (found.peak(memory, 8, 4096) for memory in (Memory.off, Memory.least))
    whole = found.layout(Memory.auto, 8, 4096, off)
    assert whole.levels == found.layout(Memory.off, 8, 4096).levels
    assert whole.store is None
    rates, card = [], called("H100 SXM")
    assert card is not None
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        limit = int(least + share * (off - least)) + 2**21
        assert found.peak(Memory.auto, 8, 4096, limit) <= limit
        rates.append(Pace(found, card).rate(Memory.auto, 8, 4096, limit))
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 1.1 * rates[-1]
    assert [layer.choose for layer in found.layers] == [None] * 28, "the layers were left as they were"


def test_host_memory_bounds_what_offload_leaves_there() -> None:
    found = forecast("+model=qwen3", "model.shape=qwen3-0.6b", *LORA)
    roomy, narrow = (instead(found, host_memory=size) for size in (64.0, 0.25))
    room = free(8)
    assert roomy.longest(Memory.offload, room) > narrow.longest(Memory.offload, room)
    assert narrow.longest(Memory.offload, room) > narrow.longest(Memory.off, room)
    length = narrow.longest(Memory.offload, room)
    assert narrow.host(Memory.offload, 1, length, room) <= 0.25 * GIB
    assert narrow.peak(Memory.offload, 1, length, room) <= room


def test_frozen_embedding_and_head_leave_where_they_are_two() -> None:
    """Llama-3.1-8B: 0.98 GiB each; tied models have one matrix that everything needs."""
    found = forecast("+model=llama", "model.shape=llama3.1-8b", "model.dtype=bfloat16", *LORA)
    assert found.plan.trainer is not None
    both = 2 * 2 * 128_256 * 4096
    assert found.left(Memory.offload) == both
    assert found.left(Memory.least) == found.left(Memory.off) == 0
    roomy = instead(found, host_memory=640.0)
    away = roomy.layout(Memory.offload, 1, 131_072).store
    assert away is not None
    inputs = away.away * 2 * 131_072 * 4096
    assert inputs == 30 * 2**30
    assert away.attended == 31
    assert roomy.host(Memory.offload, 1, 131_072) == inputs + 31 * 2 * 131_072 * 4096 + both
    inputs -= away.attended_bytes(sizes(roomy.layers, 1, 131_072))
    # The embedding is never there; the head is while it works, at a time when the layers need less.
    saved = roomy.peak(Memory.least, 1, 131_072) - roomy.peak(Memory.offload, 1, 131_072)
    assert both // 2 <= saved - inputs <= both
    writes = replace(found, plan=replace(found.plan, trainer=replace(found.plan.trainer, passes=Passes(written=8))))
    assert writes.left(Memory.offload) == both // 2, "the head stays where completions are written"
    tied = forecast("+model=qwen3", "model.shape=qwen3-0.6b", *LORA)
    assert tied.left(Memory.offload) == 0


def test_what_a_trainer_says_of_a_row_counts() -> None:
    """Memory goes by the sequences of a row, time by everything that is read."""
    found, card = forecast("+model=qwen3", "model.shape=qwen3-0.6b", *LORA), called("H100 SXM")
    assert card is not None

    def of(**passes: object) -> Forecast:
        return replace(found, passes=Passes(**passes))

    def seconds(forecast: Forecast) -> float:
        return Pace(forecast, card).micro_batch(Memory.least, 2, 2048)

    assert of(sequences=2).peak(Memory.least, 2, 2048) == found.peak(Memory.least, 4, 2048)
    assert seconds(of(unlearnt=2)) - seconds(of(unlearnt=1)) == pytest.approx(seconds(of(unlearnt=1)) - seconds(found))
    assert seconds(of(unlearnt=2, times=2)) == pytest.approx(seconds(of(unlearnt=1)))
    assert seconds(of(logprobs=True)) > seconds(found)
    # A cache of keys and values: 28 layers, 8 heads of 128, two bytes, key and value.
    assert of(written=64).row_bytes == 28 * 8 * 128 * 2 * 2
    assert of().writing(Memory.off, 8, 2048) == 0
    four, eight = (of(written=64).writing(Memory.off, rows, 2048) for rows in (4, 8))
    assert eight - four == 4 * (2048 * of(written=64).row_bytes + 16 * 151_936)
    there = found.fixed - found.gradients + WORKSPACES + 4 * (2048 * of(written=64).row_bytes + 16 * 151_936)
    assert 0.3 < (four - there) / GIB < 0.4, "a pass over 8,192 tokens of prompts"


def test_gradients_come_while_layers_let_go_of_what_they_kept() -> None:
    """But for those that are there already, of a micro-batch before."""
    found = forecast("+model=qwen3", "model.shape=qwen3-0.6b", *FULL)
    at_once, by_two = (found.instead(global_batch=rows).peak(Memory.least, 4, 4096) for rows in (4, 8))
    head = 2 * 151_936 * 1024
    assert 0 < by_two - at_once < found.gradients
    assert found.head_gradient == head
    assert at_once > found.fixed - found.gradients + found.kept(found.layout(Memory.least, 4, 4096), 4, 4096) + 2 * head
    assert found.instead(global_batch=1).peak(Memory.least, 1, 16) > found.fixed
    assert forecast("+model=qwen3", "model.shape=qwen3-0.6b", *LORA).head_gradient == 0


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        ("+trainer=sft", Passes()),
        ("+trainer=cpt", Passes()),
        ("+trainer=dpo", Passes(sequences=2, unlearnt=2, logprobs=True)),
        ("+trainer=dpo trainer.precompute_reference=true", Passes(sequences=2, logprobs=True)),
        ("+trainer=orpo", Passes(sequences=2, logprobs=True)),
        ("+trainer=simpo", Passes(sequences=2, logprobs=True)),
        ("+trainer=kto", Passes(unlearnt=3, least_rows=2, logprobs=True)),
        ("+trainer=kto trainer.precompute_reference=true", Passes(unlearnt=1, least_rows=2, logprobs=True)),
        ("+trainer=kto trainer.loss_type=apo_zero_unpaired", Passes(unlearnt=1, logprobs=True)),
        ("+trainer=grpo", Passes(written=64, logprobs=True)),
        ("+trainer=grpo trainer.beta=0.1 trainer.max_completion_length=9",
         Passes(unlearnt=1, written=9, logprobs=True)),
        ("+trainer=rloo", Passes(unlearnt=1, written=64, logprobs=True)),
        ("+trainer=ppo", Passes(unlearnt=2, written=64, times=4, logprobs=True)),
        ("+trainer=online_dpo", Passes(sequences=2, unlearnt=2, written=64, logprobs=True)),
    ],
)  # fmt: skip
def test_trainers_say_what_a_row_is(words: str, passes: Passes) -> None:
    _, plan = pipeline.prepare(validated(["+model=qwen3", "model.tiny=true", *words.split(), "output_dir=nowhere"]))
    assert plan.trainer is not None
    assert (plan.trainer.passes or Passes()) == passes


def test_a_reference_of_all_weights_is_a_copy_of_them() -> None:
    words = ("+model=qwen3", "model.tiny=true", "model.dtype=bfloat16", "+trainer=dpo", "adapter=full")
    found = forecast(*words)
    assert found.fixed - replace(found, passes=Passes(sequences=2)).fixed == 2 * found.trained
    adapted = forecast(*words[:-1])
    assert adapted.fixed == replace(adapted, passes=Passes(sequences=2)).fixed, "its adapter is switched off"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("+model=qwen3 +trainer=reward", "`TrainerSpec.passes`"),
        ("+model=qwen2_vl +trainer=sft data=images", "what images take"),
    ],
)
def test_what_is_not_counted_is_said(words: str, reason: str, in_tmp, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", *words.split(), "model.tiny=true", "gpu_memory=8"]) == 0
    assert reason in capsys.readouterr().out


def test_a_teacher_and_an_adapter_from_a_folder_are_not_counted() -> None:
    hooks, plan = pipeline.prepare(validated(["+model=qwen3", "model.tiny=true", "+trainer=sft", "output_dir=nowhere"]))
    model = on_meta(hooks, plan)[0]
    assert plan.trainer is not None
    assert isinstance(Forecast.of(plan, model), Forecast)
    goes_on = replace(plan, run=replace(plan.run, adapter=replace(plan.run.adapter, path="runs/one/adapter")))
    assert Forecast.of(goes_on, model) == "what an adapter takes that goes on from a folder is not counted"
    taught = replace(plan, trainer=replace(plan.trainer, teacher=True))
    assert "teacher" in str(Forecast.of(taught, model))
