"""The benches of preferences and rewards, run for real on a tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpo_memory
import grpo_whole
import preference_step
import pytest
from rlbench import alike, growth, learning, options, rows, table
from rlbench.sides import ftcore as ftcore_side
from rlbench.whole import Steps
from test_benches import run

from ftcore.bytes_tokenizer import byte_tokenizer

TINY = ("--device", "cpu", "--tiny")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "dpo", "kto"])
def test_both_sides_take_the_same_first_step(trainer: str, tmp_path: Path) -> None:
    words = [*TINY, "--trainers", trainer, "--memory", "least", "--ahead", *(["--profile"] if trainer == "dpo" else [])]
    done = run("preference_step.py", *words, out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first losses agree within 0.5 % or 0.001" in done.stdout
    assert "norms of the first gradients agree within 5 %" in done.stdout
    kept = json.loads((tmp_path / "preference-tiny-320.json").read_text(encoding="utf-8"))
    trl, ours = (kept["results"][trainer][label] for label in ("trl", "ftcore least"))
    assert trl["trained"] == ours["trained"] > 0
    assert trl["adapter_at_start"] == ours["adapter_at_start"]
    assert trl["first_gradient"] == pytest.approx(ours["first_gradient"], rel=1e-3)
    assert trl["first_gradient"] > 0
    assert ours["claims"]
    assert kept["command"].endswith(" ".join(words))
    assert (tmp_path / "profile-dpo.txt").is_file() == (trainer == "dpo")


@pytest.mark.slow
def test_a_whole_step_on_nf4_writes_every_token(tmp_path: Path) -> None:
    done = run("grpo_whole.py", *TINY, "--memory", "least", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ftcore memory=least, float32: " in done.stdout
    result = json.loads((tmp_path / "grpo-whole-tiny.json").read_text(encoding="utf-8"))["results"][
        "ftcore memory=least"
    ]
    assert {part: len(seconds) for part, seconds in result["seconds"].items()} == {"generation": 3, "training": 3}
    assert min(result["generation_s"], result["training_s"]) > 0
    assert "+quantizer=bnb_nf4" in result["ftcore"]


@pytest.mark.slow
def test_a_whole_step_of_several_prompts_beside_trl_s(tmp_path: Path) -> None:
    words = ["--sides", "trl,ftcore", "--quantizer", "none", "--prompts", "2", "--memory", "least"]
    done = run("grpo_whole.py", *TINY, *words, "--ahead", "--budget", "300", out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ftcore memory=least: " in done.stdout
    assert "times the speed of trl (" in done.stdout
    results = json.loads((tmp_path / "grpo-whole-tiny.json").read_text(encoding="utf-8"))["results"]
    trl, ours = results["trl"], results["ftcore memory=least"]
    assert trl["trained"] == ours["trained"] > 0
    assert len(trl["seconds"]["generation"]) == len(ours["seconds"]["generation"]) == 3
    assert "trainer.num_generations=2" in ours["ftcore"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_rewards_of_every_seed_are_read(trainer: str, tmp_path: Path) -> None:
    words = [trainer, *TINY, "--steps", "2", "--seeds", "0", "--size", "8", "--new", "2", "--", "data.size=50"]
    done = run("rl_curves.py", *words, out=tmp_path)
    assert done.returncode == 1
    assert "seed 0: 0." in done.stdout, done.stdout + done.stderr
    assert "verdict: NOT at least 0.2 more reward in each of 1 seeds" in done.stdout
    (file,) = tmp_path.glob(f"rl-{trainer}-*.json")
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert set(kept["runs"]["0"]["rewards"]) == ({"1", "2"} if trainer == "grpo" else {"1"})
    assert kept["ftcore"][-1] == "data.size=50"
    assert sum(word.startswith("data.size=") for word in kept["ftcore"]) == 1


def test_grpo_also_shares_its_prompts_where_that_is_asked() -> None:
    words = [*TINY, "--trainers", "dpo,grpo", "--memory", "least,auto"]
    labels: dict[str, list[str]] = {"dpo": [], "grpo": []}
    for trainer, _, memory, shared, label in preference_step.jobs(options.arguments([*words, "--shared"], None)):
        labels[trainer].append(label)
        job = replace(work(trainer), memory=memory, shared=shared)
        said = "trainer.share_prompts=true" in ftcore_side.overrides(job, "run")
        assert said == shared == label.endswith(" shared")
    assert labels["dpo"] == ["trl", "ftcore least", "ftcore auto"]
    assert labels["grpo"] == ["trl", "ftcore least", "ftcore least shared", "ftcore auto", "ftcore auto shared"]


def work(trainer: str, **changes: Any) -> Any:
    found = options.arguments([*TINY, *(f"--{name}={value}" for name, value in changes.items())], None)
    return options.work(found, trainer)


def test_rows_are_exactly_so_long() -> None:
    tokenizer = byte_tokenizer()

    def tokens(messages: list[dict[str, str]], generate: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        return list(tokenizer(text)["input_ids"])

    for trainer, answers in (("dpo", ("chosen", "rejected")), ("kto", ("completion",)), ("grpo", ())):
        job = work(trainer)
        found = list(rows.dataset(job, tokenizer))
        assert len(found) == job.total * (1 if trainer == "grpo" else job.batch)
        assert {len(tokens(row["prompt"], generate=True)) for row in found} == {256}
        assert {len(tokens(row["prompt"] + row[answer])) for row in found for answer in answers} == (
            {320} if answers else set()
        )
        assert len({row["prompt"][0]["content"] for row in found}) == len(found)
    prompt = tokens(found[0]["prompt"], generate=True)
    given = rows.completions(job, tokenizer, [prompt] * 4)
    assert given == rows.completions(job, tokenizer, [prompt] * 4)
    assert [len(ids) for ids in given] == [64] * 4
    assert len({tuple(ids) for ids in given}) == 4
    assert rows.by_place(given) == pytest.approx([0, 1 / 3, 2 / 3, 1])
    with pytest.raises(SystemExit, match=r"leaves -16 tokens for a prompt and 315 for an answer: raise --prompt"):
        rows.dataset(replace(job, prompt=3), tokenizer)


def test_pairs_are_two_rows_and_memory_may_be_a_part_of_trls() -> None:
    assert work("dpo").batch == 2
    assert work("dpo", pairs=3).batch == 3
    assert work("kto", pairs=3).batch == 4
    trl = {"status": "ok", "base_gib": 2.0, "above_gib": 10.0}
    assert preference_step.within("auto@0.6x", trl) == "auto@8.000"
    assert preference_step.within("auto@0.6x", None) == "auto"
    assert preference_step.within("auto@20", None) == "auto@20"
    with pytest.raises(SystemExit):
        options.arguments(["--trainers", "dpo,sft"], None)
    with pytest.raises(SystemExit):
        options.arguments(["--rows", "3"], None)


def result(loss: float, gradient: float = 1.0, speed: float = 1.0, above: float = 1.0) -> dict[str, Any]:
    numbers = dict.fromkeys(("step_ms", "base_gib", "peak_gib", "reserved_gib"), 1.0)
    measured = {"tokens_per_second": speed, "above_gib": above, "first_loss": loss, "first_gradient": gradient}
    return {"status": "ok", "trained": 5, "adapter_at_start": "a", **numbers, **measured}


def test_the_table_holds_ftcore_to_the_targets() -> None:
    results = {"trl": result(0.6931), "ftcore least": result(0.6935, 1.01, speed=1.5, above=0.5)}
    assert table.good(results)
    assert table.verdicts(results)[-1] == (
        "ftcore least: speed 1.50 times TRL's (reaches 1.3), memory above the weights 0.50 of TRL's (within 0.6)"
    )
    assert table.rows(results).splitlines()[2].split()[:4] == ["ftcore", "least", "2", "1.50"]
    results["ftcore auto"] = {"status": "failed", "detail": ""}
    assert not table.good(results)
    assert table.rows(results).splitlines()[3].split() == ["ftcore", "auto", "failed"]


@pytest.mark.parametrize(("loss", "gradient", "said"), [(0.7, 1, "FIRST LOSSES"), (0.6931, 1.2, "FIRST GRADIENTS")])
def test_other_work_is_said(loss: float, gradient: float, said: str) -> None:
    results = {"trl": result(0.6931), "ftcore least": result(loss, gradient)}
    assert not table.good(results)
    assert any(line.startswith(said) for line in table.verdicts(results))
    results["ftcore least"]["adapter_at_start"] = "b"
    assert "adapters begin as other numbers: first gradients are not compared" in table.verdicts(results)


def test_losses_near_0_agree_by_a_thousandth() -> None:
    assert table.agree({"trl": result(0.0), "ftcore least": result(-9e-4)})
    assert not table.agree({"trl": result(0.0), "ftcore least": result(2e-3)})
    assert not table.agree({"trl": result(float("nan")), "ftcore least": result(0.0)})


def test_the_ends_of_a_run_are_compared() -> None:
    found = {step: 0.1 if step <= 20 else 0.5 if step > 80 else 9.0 for step in range(1, 101, 2)}
    assert learning.ends(found, 100) == pytest.approx((0.1, 0.5))
    assert learning.verdict({"0": 0.4, "1": 0.2}) == "verdict: at least 0.2 more reward in each of 2 seeds"
    assert learning.verdict({"0": 0.4, "1": float("nan")}).startswith("verdict: NOT ")
    assert learning.verdict({}) == "verdict: NO RUN"


@pytest.mark.slow
def test_both_generators_are_learnt_from_and_their_memory_is_noted(tmp_path: Path) -> None:
    done = run("grpo_memory.py", *TINY, out=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generator=fast, seed 0: 4 steps" in done.stdout
    assert "verdict: none, memory is measured on a GPU only" in done.stdout
    kept = json.loads((tmp_path / "grpo-memory.json").read_text(encoding="utf-8"))
    assert [run["generator"] for run in kept["runs"]] == ["transformers", "fast"]
    for one in kept["runs"]:
        assert set(one["rewards"]) == {"1", "2", "3", "4"}
        assert [step["step"] for step in one["memory"]] == [1, 2, 3, 4]
        assert min(one["sizes"]["host"]) > 2**20
    assert "equal in kind" in kept["compared"][0]
    pytest.importorskip("matplotlib")
    assert "generator=fast" in (tmp_path / "reward-curves.svg").read_text(encoding="utf-8")
    words = ["--plot", str(tmp_path / "grpo-memory.json"), "--to", str(tmp_path / "c.svg")]
    drawn = run("grpo_memory.py", *words, out=tmp_path)
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "c.svg").read_bytes() == (tmp_path / "reward-curves.svg").read_bytes()


def steps(count: int, **sizes: Any) -> list[dict[str, int]]:
    return [{"step": n, **{name: int(size(n)) for name, size in sizes.items()}} for n in range(1, count + 1)]


def test_memory_that_grows_after_the_first_steps_is_said() -> None:
    flat = growth.growth(steps(200, allocated=lambda n: 1000 + n % 7, reserved=lambda n: 3000 if n > 20 else n))
    assert flat == {"allocated": (1003, 1003), "reserved": (3000, 3000)}
    assert growth.grown(flat) == []
    leak = growth.growth(steps(200, allocated=lambda n: 1000 + n, reserved=lambda n: 3000, retries=lambda n: n > 150))
    assert leak["allocated"] == (1030.5, 1190.5)
    assert growth.grown(leak) == ["allocated", "retries"]
    assert "allocated 0.0 to 0.0 MiB (+15.53 %)" in growth.said(leak)
    recording = steps(200, allocated=lambda n: min(n // 12, 8), shapes=lambda n: min(n // 12, 8))
    assert growth.settled(recording) == 96
    assert growth.growth(recording) == {"allocated": (8, 8)}
    assert growth.settled(flat_steps := steps(200, allocated=lambda n: n // 12)) == 0
    assert growth.grown(growth.growth(flat_steps)) == ["allocated"]
    assert growth.growth(steps(21, allocated=lambda n: n)) == {}
    assert growth.growth(steps(24, allocated=lambda n: n)) == {"allocated": (21.5, 23.5)}


def test_no_verdict_without_measurements() -> None:
    few, none, good = ({"grown": [], "sizes": s, "memory": m} for s, m in (
        ({}, [{"allocated": 1}]), ({"host": (1, 1)}, [{"host": 1}]), ({"allocated": (1, 1)}, [{"allocated": 1}]),
    ))  # fmt: skip
    assert grpo_memory.verdict([good, few], 20) == ("verdict: TOO FEW STEPS", False)
    assert grpo_memory.verdict([none], 20)[1]
    assert grpo_memory.verdict([good], 20) == ("verdict: no growth of memory after step 20", True)
    assert grpo_memory.verdict([good, {**good, "grown": ["reserved"]}], 20)[1] is False


def test_rewards_are_compared_with_chance() -> None:
    calm, restless = [0.5] * 60, [0.0] * 20 + [0.4] * 20 + [0.6] * 20
    assert alike.difference([calm], [restless]) == pytest.approx((0.0, 0.2))
    assert alike.difference([calm], [[0.9] * 60]) == pytest.approx((0.4, 0.0))
    assert alike.difference([calm, [0.7] * 60], [calm, calm]) == pytest.approx((0.1, 0.2))
    runs = [{"generator": name, "rewards": dict(enumerate(curve))} for name, curve in (("a", calm), ("b", [0.9] * 60))]
    assert grpo_memory.compared(runs)[0].endswith("FURTHER APART than that")
    assert grpo_memory.compared(runs[:1]) == ["rewards: nothing to compare"]
    assert alike.windows([1.0, 3.0, 5.0], 2) == [2.0, 5.0]


def whole(generation: float, training: float, peak: int) -> dict[str, Any]:
    return {"status": "ok", "generation_s": generation, "training_s": training, "peak_bytes": peak, "weights_bytes": 10}


def test_a_whole_step_is_held_to_the_faster_of_trls() -> None:
    results = {"trl": whole(9, 1, 30), "trl-continuous": whole(5, 1, 50), "ftcore memory=auto": whole(0.5, 0.5, 30)}
    assert grpo_whole.verdicts(results) == [
        "ftcore memory=auto: 6.00 times the speed of trl-continuous (reaches 5), "
        "memory above the weights 0.50 of its (within 0.6)"
    ]
    results["trl-continuous"] = {"status": "failed"}
    (said,) = grpo_whole.verdicts(results)
    assert "10.00 times the speed of trl (reaches 5), memory above the weights 1.00 of its (OVER 0.6)" in said
    assert grpo_whole.verdicts({"ftcore memory=auto": whole(1, 1, 5)}) == []


def test_a_spent_budget_ends_a_side_once_a_step_was_timed() -> None:
    job = replace(work("grpo"), budget=1e-9)
    for budget, expected in ((1e-9, [False, True]), (0, [False, False]), (1e9, [False, False])):
        callback = Steps(None, replace(job, budget=budget))
        callback.on_train_begin(None, None, None)
        stops = []
        for step in (1, 2):
            control = SimpleNamespace(should_training_stop=False)
            callback.on_step_end(None, SimpleNamespace(global_step=step), control)
            stops.append(control.should_training_stop)
        assert stops == expected
