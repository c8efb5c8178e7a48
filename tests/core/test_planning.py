"""What `ftcore plan` says of a GPU that need not be there, and how many rows `trainer.micro_batch=-1` takes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

from ftcore import batch, cards, pipeline, planning
from ftcore.api import validated
from ftcore.batch import WORTH, best_rows
from ftcore.cards import Card, called, of_size
from ftcore.cli import run as command
from ftcore.config import Memory
from ftcore.forecast import Forecast, free
from ftcore.meta_model import on_meta
from ftcore.specs import Passes
from ftcore.step_time import Pace
from ftcore.testing import runs

QWEN = ("+model=qwen3", "model.shape=qwen3-0.6b", "model.dtype=bfloat16", "+trainer=sft")
LONG = ("trainer.max_length=8192", "trainer.global_batch=4")


@lru_cache(maxsize=1)
def forecast(*words: str) -> Forecast:
    hooks, plan = pipeline.prepare(validated([*words, "output_dir=nowhere", "host_memory=64"]))
    found = Forecast.of(plan, on_meta(hooks, plan)[0])
    assert isinstance(found, Forecast)
    return found


# Cards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx 3090", "RTX 3090"),
        ("L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("NVIDIA B300", None),
        ("CPU", None),
    ],
)
def test_names_of_cards(name, card) -> None:
    found = called(name)
    assert (found.name if found else None) == card


def test_a_card_of_a_size() -> None:
    assert of_size(24).memory == 24
    assert of_size(79).name == "H100 SXM"
    assert of_size(1000).name == "H200"
    for card in cards.cards().values():
        assert 0.88 * card.memory < card.there < card.memory
        assert card.flops > 1e13
        assert 1e10 <= card.host < card.bandwidth < 1e13
        assert called(card.name) == card


def test_a_card_that_nobody_knows_is_measured(monkeypatch) -> None:
    made = Card("B300", 288, 268, 1e15, 1e12, 1e10)
    monkeypatch.setattr(cards, "measured", lambda name: made if name == "B300" else None)
    assert cards.present(SimpleNamespace(name="B300")) is made
    assert cards.present(SimpleNamespace(name="NVIDIA L4")).name == "L4"
    monkeypatch.setattr(cards, "measured", lambda name: made)
    for name in ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert cards.present(SimpleNamespace(name=name)) is made


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_card_that_is_there_is_measured() -> None:
    name = torch.cuda.get_device_name()
    made, known = cards.measured(name), called(name)
    assert 1e12 < made.flops < 1e16
    assert 1e9 < made.host < made.bandwidth < 1e14
    if known is not None:
        assert 0.4 < made.flops / known.flops < 1.1
        assert 0.4 < made.bandwidth / known.bandwidth < 1.5, "part of a copy may stay in the cache"


def test_weights_in_host_memory_have_to_fit_there() -> None:
    words = ("+model=llama", "model.shape=llama3.1-8b", "model.dtype=bfloat16", "+trainer=sft")
    found = forecast(*words)
    for host, there in ((64.0, True), (1.0, False)):
        of = replace(found, plan=replace(found.plan, run=replace(found.plan.run, host_memory=host)))
        assert of.fits(Memory.offload, 1, 1024, free(80)) is there


def test_the_host_s_memory_is_named_where_it_is_what_is_short() -> None:
    """And no row is said to fit that the host has no room for."""
    found = forecast("+model=llama", "model.shape=llama3.1-8b", "model.dtype=bfloat16", "+trainer=sft")
    of = replace(found, plan=replace(found.plan, run=replace(found.plan.run, host_memory=1.0)))
    _, said, longest, most, *_ = planning.line(of, of_size(80), Memory.offload, free(80))
    assert said.endswith("too much for the host")
    assert (longest, most) == ("0", "0")
    assert planning.line(of, of_size(80), Memory.offload, free(8))[1].endswith("GiB, too much")


# The table ---------------------------------------------------------------------------------------------------------


def said(capsys, *words: str) -> tuple[list[list[str]], str]:
    """The lines of the settings, cut at their columns, and everything."""
    assert command(["plan", *QWEN, *words]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("  memory=")]
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines], out


def test_the_plan_shows_every_setting(in_tmp, capsys) -> None:
    lines, out = said(capsys, "gpu_memory=24", "host_memory=64", "trainer.global_batch=4", "trainer.max_length=1024")
    assert "Memory of a GPU of 24 GiB (a forecast)" in out
    assert [line[0] for line in lines] == [f"memory={m}" for m in ("off", "least", "offload", "auto")]
    assert all(line[1].endswith("GiB") and line[5].startswith("~") and line[6].startswith("~") for line in lines)
    longest = [int(line[2].replace(",", "")) for line in lines]
    assert longest[0] < longest[1] < longest[2]
    assert longest[0] < longest[3] <= longest[2]
    assert [line[4] == "0" for line in lines] == [True, True, False, True]
    assert lines[3][1:2] + lines[3][5:] == lines[0][1:2] + lines[0][5:], "everything fits, so auto is off"
    assert "auto: nothing is computed again; times as on a L4" in out
    assert "none of these fits" not in out


@pytest.mark.parametrize("gibibytes", [4, 5.5, 6.5])
def test_what_auto_has_room_for_has_no_gaps(gibibytes) -> None:
    """Recorded launches take more memory, which may be short for a row although longer ones fit without them."""
    found, room = forecast(*QWEN), free(gibibytes)
    assert all(found.peak(Memory.auto, 1, 256 * number, room) <= room for number in range(1, 24))
    assert found.longest(Memory.auto, room) > 24 * 256


def test_activations_in_32_bits_are_counted_so() -> None:
    rows, length = 4, 1024
    found = {}
    for dtype in ("bfloat16", "float32"):
        of = forecast("+model=qwen3", "model.shape=qwen3-0.6b", f"model.dtype={dtype}", "+trainer=sft")
        work, head = of._for_a_while(Memory.off, rows, length, tiled=False)
        found[dtype] = of.kept(of.layout(Memory.off, rows, length), rows, length), work, head
    for half, whole in zip(found["bfloat16"], found["float32"], strict=True):
        assert 1.3 * half < whole <= 2 * half
    assert found["float32"][0] == pytest.approx(2 * found["bfloat16"][0], rel=0.01)


def test_a_named_card_brings_its_memory_and_its_pace(in_tmp, capsys) -> None:
    slow, out = said(capsys, "gpu=T4", "host_memory=64")
    assert "Memory of a GPU of 14.5 GiB" in out
    fast, out = said(capsys, "gpu=H100", "gpu_memory=14.5", "host_memory=64")
    assert "Memory of a GPU of 14.5 GiB" in out
    assert "times as on a H100 SXM\n" in out
    assert "float32 takes several times as long" in said(capsys, "gpu=H100", "model.dtype=float32")[1]
    assert [line[:3] for line in slow] == [line[:3] for line in fast]
    rates = [[float(line[6].strip("~ ").replace(",", "")) for line in lines] for lines in (slow, fast)]
    assert all(4 * a < b for a, b in zip(*rates, strict=True))


def test_a_limit_is_what_auto_plans_with(in_tmp, capsys) -> None:
    """And nobody else: with the others it is refused."""
    free, _ = said(capsys, "gpu_memory=24")
    limited, out = said(capsys, "gpu_memory=24", "memory_limit=3", "memory=auto")
    names = [line[0] for line in free]
    assert [name for name, a, b in zip(names, free, limited, strict=True) if a != b] == ["memory=auto"]
    at = names.index("memory=auto")
    assert float(limited[at][1].split()[0]) <= 3 < float(free[at][1].split()[0])
    assert "auto: nothing is computed again" not in out


def test_where_nothing_fits_the_next_setting_is_named_and_fits(in_tmp, capsys) -> None:
    """4-bit weights, 8-bit moments, fewer rows, shorter ones: the first that does, and what it says is right."""
    found = forecast(*QWEN, *LONG)
    fixed = found.fixed
    answers = {}
    for part in (0.3, 0.8, 1.0, 1.2):
        room = int(part * fixed)
        if not any(found.fits(memory, found.rows, found.length, room) for memory in planning.ORDER):
            answers[part] = planning.next_setting(found, room)
    assert answers[0.3] == "no setting of this model does; take a smaller model"
    assert any("+quantizer=bnb_nf4" in answer for answer in answers.values())
    assert any("trainer.micro_batch=" in answer for answer in answers.values())
    for part, answer in answers.items():
        if answer.startswith("set "):
            words = answer.removeprefix("set ").split()
            _, plan = runs.prepared([*QWEN, *LONG, "host_memory=64", "output_dir=nowhere", *said_but_memory(words)])
            again, memory = replace(found, plan=plan), Memory(dict(word.split("=") for word in words)["memory"])
            assert again.fits(memory, again.rows, again.length, int(part * fixed)), answer


def test_what_the_run_refuses_is_not_named(in_tmp, capsys) -> None:
    """PiSSA starts from weights that a quantizer has rounded away."""
    words = ["gpu_memory=1.5", "host_memory=64", "trainer.global_batch=1", "trainer.max_length=256"]
    for init in ("default", "pissa"):
        _, out = said(capsys, *words, f"adapter.init={init}")
        assert "none of these fits" in out
        assert ("+quantizer=" in out) == (init == "default")


def test_long_completions_are_what_is_to_be_shorter() -> None:
    """A prompt and a completion are a row, so that `trainer.max_length` alone changes nothing."""
    words = ["+model=llama", "model.shape=llama3.2-1b", "model.dtype=bfloat16", "+trainer=grpo", "+reward=[length]"]
    words += ["trainer.global_batch=4", "trainer.micro_batch=1", "trainer.max_length=512"]
    found, room = forecast(*words, "trainer.max_completion_length=130000"), free(5)
    assert not any(found.fits(memory, 1, found.length, room) for memory in planning.ORDER)
    said = planning.next_setting(found, room).removeprefix("set ").split()
    assert [word.partition("=")[0] for word in said][-1] == "trainer.max_completion_length"
    _, plan = runs.prepared([*words, "host_memory=64", "output_dir=nowhere", *said_but_memory(said)])
    again = replace(found, plan=plan, passes=plan.trainer.passes)
    assert 256 < again.length < found.length
    assert again.fits(Memory.offload, 1, again.length, room)


def said_but_memory(words: list[str]) -> list[str]:
    """`memory=offload` is refused where there is no GPU."""
    return [word for word in words if not word.startswith("memory=")]


def test_moments_in_8_bits_are_named_where_they_are_what_is_missing(in_tmp, capsys) -> None:
    lines, out = said(capsys, "adapter=full", "gpu_memory=5", "trainer.global_batch=1", "trainer.max_length=256")
    assert all(line[1].endswith("too much") for line in lines)
    assert all(line[4:] == ["-", "-", "-"] for line in lines)
    assert "none of these fits: set trainer.optimizer=adamw_8bit memory=least" in out
    _, out = said(
        capsys, "adapter=full", "gpu_memory=5", "trainer.global_batch=1", "trainer.max_length=256",
        "trainer.optimizer=adamw_8bit",
    )  # fmt: skip
    assert "none of these fits" not in out


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("gpu_memory=-1", "gpu_memory: is -1"),
        ("host_memory=-1", "host_memory: is -1"),
        ("gpu=abacus", "gpu: no figures of a GPU called 'abacus' are known"),
        ("trainer.micro_batch=-2", "trainer.micro_batch: is -2"),
    ],
)
def test_what_makes_no_sense_is_refused(word, error, in_tmp, capsys) -> None:
    assert command(["plan", "+model=qwen3", "model.tiny=true", "+trainer=sft", word]) == 2
    assert error in capsys.readouterr().err


def test_layers_that_nobody_counted(in_tmp, capsys) -> None:
    words = ["plan", "+model=qwen3", "model.tiny=true", "+trainer=sft", "adapter.dropout=0.1", "gpu_memory=8"]
    assert command(words) == 0
    assert "nobody has counted" in capsys.readouterr().out


# trainer.micro_batch=-1 --------------------------------------------------------------------------------------------


def test_rows_that_are_worth_their_memory() -> None:
    """No more rows than gain something, none that do not fit, and at least as many as the loss compares."""
    found = forecast(*QWEN, "trainer.global_batch=64", "trainer.max_length=512")
    card = called("H100")
    assert card is not None
    pace = Pace(found, card)
    chosen = {}
    for room in (free(80), free(8), free(4)):
        rows, reason = best_rows(pace, Memory.auto, room)
        assert 64 % rows == 0
        assert found.peak(Memory.auto, rows, 512, room) <= room
        assert "by the forecast" in reason
        fitting = [n for n in (1, 2, 4, 8, 16, 32, 64) if found.peak(Memory.auto, n, 512, room) <= room]
        rates = {n: pace.rate(Memory.auto, n, 512, room) for n in fitting}
        assert rates[rows] >= WORTH * max(rates.values())
        assert all(rates[n] < WORTH * max(rates.values()) for n in fitting if n < rows)
        chosen[room] = rows
    assert 1 < chosen[free(80)] < 64
    rows, reason = best_rows(pace, Memory.auto, found.fixed)
    assert rows == 1
    assert "no number of rows" in reason
    pairs = replace(pace, forecast=replace(found, passes=Passes(least_rows=8)))
    assert best_rows(pairs, Memory.off, free(80))[0] >= 8


def test_the_plan_gets_the_number(in_tmp, monkeypatch, capsys) -> None:
    words = [*QWEN, "trainer.micro_batch=-1", "trainer.global_batch=16", "trainer.max_length=256", "output_dir=nowhere"]
    hooks, plan = pipeline.prepare(validated(words))
    assert plan.run.trainer is not None
    assert plan.run.trainer.micro_batch == 0, "a CPU has no forecast"
    assert "because there is no GPU" in capsys.readouterr().out
    gpu = SimpleNamespace(
        kind="cuda", name="NVIDIA L4", memory=22 * 2**30, capability=(8, 9), dtype="bfloat16", runs_triton=False
    )
    open_ = replace(plan.run, trainer=replace(plan.run.trainer, micro_batch=-1))
    decided = batch.decided(hooks, replace(plan, device=gpu, run=open_))
    assert decided.run.trainer is not None
    assert decided.run.trainer.micro_batch in (1, 2, 4, 8, 16)
    assert "tokens a second on L4" in capsys.readouterr().out
    assert batch.decided(hooks, decided) is decided
    assert decided.run.trainer.global_batch == 16
