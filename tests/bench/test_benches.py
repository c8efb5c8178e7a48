"""The benches run for real on a tiny model, so that a GPU's minutes are not spent on their mistakes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import guard_cost
import pytest
import torch
from curvebench import compare, rows
from curvebench.training import Run, factor
from stepbench import inputs, options, processes, profiling, table, trainers
from stepbench.works import ROWS

BENCH = Path(__file__).parent
MID = [row for row in ROWS if row.startswith("1b-") and "family" in ROWS[row]]


def run(script: str, *words: str, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / script), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_every_side_runs_and_the_first_losses_agree(tmp_path: Path) -> None:
    done = run("train_step.py", "0.6b-lora", "--device", "cpu", "--tiny", "--profile", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first losses agree within 0.5 %" in done.stdout
    assert "ftcore_trainer off:" in done.stdout
    kept = json.loads((tmp_path / "0.6b-lora.json").read_text(encoding="utf-8"))
    status = {label: result["status"] for label, result in kept["results"].items()}
    assert [status.pop(side) for side in ("hf", "trl", "ftcore off", "ftcore_trainer off")] == ["ok"] * 4
    assert set(status) == {"liger", "unsloth"}
    for side in status:
        # Neither is a package of the tests.
        if status[side] == "missing":
            assert f"{side}: not installed" in done.stdout
    assert kept["results"]["hf"]["versions"]["transformers"]
    assert kept["command"].endswith("0.6b-lora --device cpu --tiny --profile")
    again = run(
        *("train_step.py", "0.6b-lora", "--device", "cpu", "--tiny", "--sides", "liger"),
        *("--known", str(tmp_path / "0.6b-lora.json"), "--rows", "3"),
        out=tmp_path,
    )
    assert "is of other work: rows is 2, not 3" in again.stderr
    assert len((tmp_path / "profile-0.6b-lora.txt").read_text(encoding="utf-8").splitlines()) > 12


@pytest.mark.slow
@pytest.mark.parametrize("row", MID)
def test_families_are_measured_on_the_same_parameters(row: str, tmp_path: Path) -> None:
    done = run("train_step.py", row, "--device", "cpu", "--tiny", "--sides", "hf,ftcore", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first losses agree within 0.5 %" in done.stdout
    kept = json.loads((tmp_path / f"{row}.json").read_text(encoding="utf-8"))
    work, (hf, ours) = kept["work"]["off"], kept["results"].values()
    assert hf["trained"] == ours["trained"] > 0
    assert hf["first_loss"] == pytest.approx(ours["first_loss"], rel=1e-4)
    assert ours["claims"]
    assert work["parameters"] if row == "1b-qwen3-moe" else not work["parameters"]
    assert "visual" in work["targets"] if row == "1b-qwen3-vl" else "q_proj" in work["targets"]


def test_images_are_before_the_words_and_are_not_trained() -> None:
    job = work(family="qwen3_vl", images=2)
    found = processes.located(job, 100)
    assert found.pop("status") == "ok"
    job = replace(job, **found)
    batches = inputs.inputs(job, 3)
    assert [batch["pixel_values"].shape for batch in batches] == [(2 * 2 * 16, 3 * 2 * 16 * 16)] * 3
    ids, labels, image = (batches[1][name] for name in ("input_ids", "labels", "mm_token_type_ids"))
    assert ids.shape == labels.shape == (2, 32)
    assert image[0].tolist() == [0, 1, 1, 1, 1, 0] * 2 + [0] * 20
    assert (ids[image == 1] == 261).all()
    assert not (ids[:, 12:] >= 259).any()
    assert (labels[:, :12] == -100).all()
    assert torch.equal(labels[:, 12:], ids[:, 12:])
    assert not torch.equal(batches[0]["input_ids"], ids)
    with pytest.raises(SystemExit, match="36 tokens of a row's 32"):
        inputs.inputs(replace(job, images=6), 3)
    with pytest.raises(SystemExit, match="bare loops only: --sides hf,ftcore"):
        trainers.dataset(job, labels=True)


@pytest.mark.slow
def test_a_side_that_fails_is_shown_and_the_others_go_on(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--quantizer", "bnb_int8", "--sides", "hf,ftcore", "--memory", "least,auto"]
    done = run("train_step.py", *words, out=tmp_path)
    assert done.returncode == 1
    assert "hf: failed, exit 1\n" in done.stdout
    assert "\nthe peers know no quantizer 'bnb_int8'\n" in done.stdout
    assert "ftcore least: " in done.stdout
    assert "ftcore auto: " in done.stdout


def work(**changes: Any) -> Any:
    words = ["--device", "cpu", "--tiny", *(f"--{name}={value}" for name, value in changes.items())]
    return next(iter(options.works(options.arguments(words, None)).values()))


def test_a_side_over_its_limit_is_ended() -> None:
    result = processes.Process("unsloth", "cpu", "sleep 60").run("{}", limit=0.5)
    assert result == {"status": "failed", "detail": "over its limit of 0 s\n"}


@pytest.mark.parametrize("row", ROWS)
def test_rows_set_options_and_the_command_line_wins(row: str) -> None:
    found = options.arguments([row, "--rows", "3"], None)
    assert found.rows == 3
    works = options.works(found)
    for memory, job in works.items():
        assert job.memory == memory
        assert job.recompute == ("off" not in works)
    assert all(getattr(found, key) == value for key, value in ROWS[row].items() if key != "rows")


def result(loss: float, seconds: float = 1.0) -> dict[str, Any]:
    numbers = dict.fromkeys(("peak_gib", "reserved_gib", "host_gib"), 1.0)
    return {"status": "ok", "tokens_per_second": 100 / seconds, "step_ms": seconds, "first_loss": loss, **numbers} | {
        "free_ms": seconds
    }


@pytest.mark.parametrize("other", [12.64, math.nan])
def test_losses_that_differ_are_said(other: float) -> None:
    assert table.agree({"hf": result(12.57), "ftcore least": result(12.6)})
    assert not table.agree({"hf": result(12.57), "ftcore least": result(other)})
    assert not table.agree({"hf": {"status": "failed", "detail": ""}})


def test_sides_that_train_other_parameters_are_said() -> None:
    results = {"hf": {**result(1), "trained": 1000}, "trl": result(1), "ftcore off": {**result(1), "trained": 1000}}
    assert table.trained_alike(results)
    results["ftcore off"]["trained"] = 1016
    assert not table.trained_alike(results)
    assert "OTHER PARAMETERS ARE TRAINED: hf 1,000, ftcore off 1,016" in table.verdicts(results)


def test_the_table_has_ratios_and_the_trainer_is_held_to_the_loop() -> None:
    results = {"hf": result(1, 2), "liger": {"status": "missing"}, "ftcore auto": result(1, 1)}
    results["ftcore_trainer auto"] = result(1, 1.2)
    lines = {line.split()[0]: line.split() for line in table.table(results).splitlines()[1:]}
    assert lines["hf"][3] == "1.00"
    assert lines["ftcore"][4] == "2.00"
    assert lines["liger"][1:] == ["not", "installed"]
    assert table.verdicts(results)[-1] == (
        "ftcore_trainer auto: 1.2 ms a step when not waited for, 1.200 times the bare loop's 1.0 (OVER 1.05)"
    )


def test_overlapping_kernels_count_once_as_busy() -> None:
    assert profiling.busy_time([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


@pytest.mark.slow
def test_curves_of_both_sides_start_alike_and_are_drawn(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--steps", "3", "--seeds", "0,1", "--dtype", "float32", "--parallel", "2"]
    done = run("loss_curves.py", *words, out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adapters at the start: the same" in done.stdout
    file = tmp_path / "curves-float32.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["runs"]["hf-0"]["losses"] == pytest.approx(kept["runs"]["ftcore-0"]["losses"], rel=1e-4)
    assert kept["runs"]["hf-0"]["adapter_at_start"] != kept["runs"]["hf-1"]["adapter_at_start"]
    pytest.importorskip("matplotlib")
    drawn = run("loss_curves.py", "--plot", str(file), str(file), "--to", str(tmp_path / "c.svg"), out=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert "ftcore, mean" in (tmp_path / "c.svg").read_text(encoding="utf-8")


def kept(hf: list[list[float]], ftcore: list[list[float]], start: str = "a") -> dict[str, Any]:
    sides = {"hf": (hf, "a"), "ftcore": (ftcore, start)}
    runs = {
        f"{side}-{seed}": {"losses": curve, "adapter_at_start": first, "skipped_steps": 0}
        for side, (curves, first) in sides.items()
        for seed, curve in enumerate(curves)
    }
    return {"dtype": "bfloat16", "gpu": "", "seeds": list(range(len(hf))), "runs": runs}


def test_the_verdict_compares_with_the_seeds() -> None:
    hf = [[2.0] * 20, [2.2] * 20]
    assert compare.gaps(hf, [[2.1] * 20, [2.3] * 20]) == pytest.approx(
        {"means": 0.1, "same_seed": 0.1, "hf_seeds": 0.2}
    )
    assert "verdict: within" in compare.report(kept(hf, [[2.1] * 20, [2.3] * 20]))
    assert "verdict: FURTHER" in compare.report(kept(hf, [[2.4] * 20, [2.6] * 20]))
    assert "verdict: FURTHER" in compare.report(kept(hf, [[math.nan] * 20, [2.2] * 20]))
    assert "verdict: none" in compare.report(kept(hf, hf, start="b"))


def test_a_seed_decides_the_order_and_padding_is_not_trained() -> None:
    given = [{"input_ids": [n] * n, "labels": [n] * n} for n in range(1, 6)]
    first, again, other = (rows.batches(given, 0, seed, steps=4, size=2) for seed in (0, 0, 1))
    assert first == again != other
    seen = [ids[0] for batch in first for ids in batch["input_ids"]]
    assert sorted(seen[:5]) == [1, 2, 3, 4, 5]
    batch = rows.padded([given[0], given[2]], 0)
    assert batch["labels"] == [[1, -100, -100], [3, 3, 3]]
    assert batch["attention_mask"] == [[1, 0, 0], [1, 1, 1]]


def test_the_learning_rate_rises_and_falls() -> None:
    run = Run(side="hf", seed=0, dtype="bfloat16", device="cpu", steps=200, size=8)
    rates = [factor(step, run.steps) for step in range(run.steps)]
    assert max(rates) == rates[9] == 1.0
    assert 0 < rates[-1] < rates[0] == 0.1


@pytest.mark.slow
def test_guards_are_measured_both_ways(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--steps", "4"]
    done = run("guard_cost.py", *words, out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waited for: " in done.stdout
    assert "left alone: " in done.stdout
    kept = json.loads((tmp_path / "guard-cost.json").read_text(encoding="utf-8"))
    assert {kind: len(of["guarded"]) for kind, of in kept["seconds"].items()} == {"waited": 4, "left": 1}


def test_turns_end_when_the_time_is_up() -> None:
    for until, left in ((0.0, 2), (math.inf, 1)):
        planned = [("", True, 1), ("waited", True, 1), ("waited", True, 1)]
        turns = guard_cost.Turns(SimpleNamespace(), planned, gpu=False, until=until)
        control = SimpleNamespace(should_training_stop=False)
        turns.on_train_begin(None, None, control)
        turns.on_step_end(None, None, control)
        assert control.should_training_stop == (until == 0)
        if not control.should_training_stop:
            turns.on_step_end(None, None, control)
        assert len(turns.turns) == left
        assert len(turns.times["waited"][True]) == 2 - left
    assert len(planned) == 3, "the plan stays as it is"


@pytest.mark.slow
def test_a_measurement_of_the_guards_that_is_told_to_stop_says_what_it_has(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--tiny", "--steps", "600", "--kinds", "waited"]
    process = subprocess.Popen(
        [sys.executable, str(BENCH / "guard_cost.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step "):
            time.sleep(4)  # the warm-up's other steps, and some pairs
            process.terminate()
            break
    said = "".join(lines) + process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "stopped by SIGTERM after step" in said
    assert "turns were not made" in said
    assert "ratio " in said
    assert json.loads((tmp_path / "guard-cost.json").read_text(encoding="utf-8"))["ratios"]["waited"] > 0


def test_turns_take_guarded_and_bare_steps_by_turns() -> None:
    assert guard_cost.turns_of(5, 2, ["waited"]) == [
        ("", True, 5), ("waited", True, 1), ("waited", False, 1), ("waited", False, 1), ("waited", True, 1),
    ]  # fmt: skip
    assert [turn[1:] for turn in guard_cost.turns_of(5, 20, ["left"])] == [
        (True, 5), (True, 10), (False, 10), (False, 10), (True, 10),
    ]  # fmt: skip
    times = {"waited": {True: [1.01, 1.0, 2.0], False: [1.0]}, "left": {True: [1.0], False: []}}
    assert guard_cost.ratios(times) == {"waited": 1.01}
    assert guard_cost.said(times) == [
        "waited for: 1010.000 ms guarded (3 x 1 steps), 1000.000 ms bare (1 x 1 steps), ratio 1.0100"
    ]
