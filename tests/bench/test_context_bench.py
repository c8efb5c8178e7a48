"""The bench of long rows, run for real on a tiny model, and its parts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import long_context
import pytest
import torch
from contextbench import ballast, search, sides, table, works
from test_benches import run

TINY = ("--device", "cpu", "--tiny")


@pytest.mark.slow
def test_wanted_lengths_are_reached_with_fewer_layers(tmp_path: Path) -> None:
    words = ["caps", *TINY, "--gib", "8,12", "--only-wanted", "--layers", "1", "--ahead"]
    done = run("long_context.py", *words, out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 GiB: 436 wanted, 436 shown, 1 of 2 layers run: reached" in done.stdout
    kept = json.loads((tmp_path / "long-context-caps.json").read_text(encoding="utf-8"))
    assert [row["tokens"] for row in kept["rows"]] == [59, 436]
    assert kept["command"].endswith(" ".join(words))
    result = kept["rows"][1]["result"]
    assert result["depth"] == 1
    assert result["ballast_gib"] == pytest.approx(result["layer_mib"] / 1024)
    assert len(result["losses"]) == len(result["gradients"]) == 2
    assert result["first_loss"] == pytest.approx(math.log(259), rel=0.1)
    assert result["claims"]


@pytest.mark.slow
def test_sides_are_timed_on_one_row(tmp_path: Path) -> None:
    done = run("long_context.py", "speed", *TINY, "--sides", "hf,ftcore", "--ahead", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "times hf's speed" in done.stdout
    rows = json.loads((tmp_path / "long-context-speed.json").read_text(encoding="utf-8"))["rows"]
    hf, ours = (row["result"] for row in rows)
    assert hf["trained"] == ours["trained"] > 0
    assert hf["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-3)
    assert len(hf["steps_ms"]) == len(ours["steps_ms"]) == 4


@pytest.mark.slow
def test_a_search_and_a_row_past_the_context_and_one_over_the_limit(tmp_path: Path) -> None:
    done = run("long_context.py", "whole", *TINY, "--tokens", "2304", "--layers", "1", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "forecast for all 2 layers: " in done.stdout
    (row,) = json.loads((tmp_path / "long-context-whole.json").read_text(encoding="utf-8"))["rows"]
    assert row["outcome"] == "done"
    assert row["result"]["planned_peak_gib"] > 0
    done = run("long_context.py", "caps", *TINY, "--gib", "8", "--limit", "1e-9", out=tmp_path)
    assert done.returncode == 1
    assert re.search("left out, its [0-9]+ s would be over the limit of 0 s", done.stdout)
    assert "8 GiB: 59 wanted, 0 shown: MISSED" in done.stdout


@pytest.mark.parametrize(
    ("room", "start", "tries", "tried", "best"),
    [
        (10_000, 5120, 2, [5120, 5376, 5632], 5632),
        (5400, 5120, 5, [5120, 5376, 5632], 5376),
        (5000, 5500, 5, [5376, 5120, 4864], 4864),
        (100, 5120, 2, [5120, 4864, 4608], 0),
        (10_000, 0, 0, [256], 256),
    ],
)
def test_a_search_goes_up_while_it_fits_and_down_until_it_does(
    room: int, start: int, tries: int, tried: list[int], best: int
) -> None:
    seen: list[int] = []

    def fits(tokens: int) -> bool:
        seen.append(tokens)
        return tokens <= room

    assert search.longest(start, fits, tries) == best
    assert seen == tried


def test_a_search_ends_where_nothing_is_known() -> None:
    assert search.longest(5120, lambda tokens: True if tokens == 5120 else None, 5) == 5120


def test_what_is_wanted_is_twice_what_unsloth_publishes() -> None:
    assert [works.wanted("ftcore", gib, 1) for gib in (8, 24, 48)] == [5944, 156_950, 383_456]
    assert works.wanted("unsloth", 24, 1) == 78_475
    assert works.wanted("ftcore", 20, 1) == 0
    assert long_context.arguments(["caps"]).gib == "8,12,16,24,40,48"


def test_figures_are_taken_from_the_length_nearest_to_a_row() -> None:
    bench = long_context.Bench(long_context.arguments(["caps", "--layers", "8"]), [])
    bench.work = replace(bench.work, layers=32)
    bench.plan = {"known": {"24": {"1000": {"host": 8.0, "seconds": 4.0}, "2000": {"host": 16.0, "seconds": 400.0}}}}
    assert bench.near(24.0, 1000) == {"host": 2.0, "seconds": 1.0}
    assert bench.near(24.0, 4000) == {"host": 8.0, "seconds": 400.0}


def test_the_ballast_is_what_the_other_layers_would_hold() -> None:
    layer = torch.nn.Module()
    layer.frozen = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16), requires_grad=False)
    layer.again = layer.frozen  # tied: once
    layer.trained = torch.nn.Parameter(torch.zeros(5))
    layer.register_buffer("scales", torch.zeros(3, dtype=torch.uint8))
    assert ballast.held(layer) == 64 + 3 + 4 * 5 * 4
    layer.frozen.quant_state = SimpleNamespace(
        absmax=torch.zeros(7, dtype=torch.uint8), code=torch.zeros(16), offset=torch.zeros(()),
        state2=SimpleNamespace(absmax=torch.zeros(2), code=torch.zeros(256), offset=None, state2=None),
    )  # fmt: skip
    assert ballast.held(layer) == 64 + 3 + 80 + 7 + 64 + 4 + 8 + 1024

    class Model(torch.nn.Module):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=2))

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False), layer])

    assert [tensor.numel() for tensor in ballast.ballast(Model(), 5)] == [ballast.held(layer)] * 3


def test_memory_that_was_not_enough_is_told_from_other_errors() -> None:
    error = RuntimeError("set memory=offload")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert sides.out_of_memory(error)
    assert not sides.out_of_memory(RuntimeError("CUDA out of luck"))


def result(**changes: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("peak_gib", "reserved_gib", "outside_gib", "ballast_gib"), 7.0)
    chance = math.log(128_256)
    measured = {"losses": [chance], "first_loss": chance, "gradients": [1.0], "tokens_per_second": 6400.0}
    return {"status": "ok", "step_ms": 10_000.0, **numbers, **measured, **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": [math.nan]}, "no finite number"),
        ({"gradients": [math.inf]}, "no finite number"),
        ({"first_loss": 2.0}, "not near 11.762"),
        ({"gradients": [0.0]}, "no gradient"),
    ],
)
def test_steps_that_teach_nothing_are_said(changes: dict[str, Any], said: str) -> None:
    assert table.sound(result(), 128_256) == ""
    assert said in table.sound(result(**changes), 128_256)


def test_the_table_has_a_line_for_every_trial_and_speed_is_held_to_what_is_wanted() -> None:
    row = {"gib": 24.0, "side": "ftcore", "tokens": 156_950, "depth": 8, "wanted": 156_950, "seconds": 20.5}
    said = table.table([{**row, "outcome": "reached", "result": result()}, {**row, "outcome": "left out"}]).splitlines()
    assert said[1].split()[:8] == ["24", "ftcore", "156,950", "8", "156,950", "reached", "7.00", "-"]
    assert said[2].split()[-3:] == ["-", "20.5", "-"]
    lines = table.speeds({"unsloth": result(tokens_per_second=3200.0, peak_gib=14.0), "ftcore": result()}, 65_536)
    assert "2.00 times unsloth's speed at 0.50 times its memory" in lines[1]
    assert lines[1].endswith("6,300 wanted: reached; at most 12 GiB: reached")
    assert "6,300 wanted: MISSED" in table.speeds({"ftcore": result(tokens_per_second=6299.0)}, 65_536)[0]


def test_a_process_over_its_cap_does_not_count_as_reaching() -> None:
    bench = long_context.Bench(long_context.arguments(["caps", "--gib", "8", "--only-wanted"]), [])
    bench.settings, bench.work = {"vocab_size": 128_256}, replace(bench.work, layers=32)
    row = {"gib": 8.0, "side": "ftcore", "tokens": 5944, "wanted": 5944, "result": result()}
    assert bench.outcome(row) == "reached"
    assert bench.outcome({**row, "tokens": 5888}) == "fits"
    assert bench.outcome({**row, "result": result(reserved_gib=8.1)}) == "over the cap"
    assert bench.outcome({**row, "result": {"status": "memory"}}) == "out of memory"
    bench.rows = [{**row, "outcome": "over the cap"}]
    assert not bench.reached(8.0)
    bench.rows = [{**row, "outcome": "reached"}]
    assert bench.reached(8.0)
