"""Rewards: what is called with what, for how long, and what a failure costs."""

from __future__ import annotations

import json
import re
import shlex
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ftcore
from ftcore.config import ScoringConfig
from ftcore.errors import Refused
from ftcore.rewards import Guarded, accepted, guarded, one_by_one
from ftcore.testing import runs
from ftcore.time_limit import OutOfTime, call_within

GRPO = ("+model=qwen3", "model.tiny=true", "+trainer=grpo", "trainer.max_completion_length=4", "trainer.global_batch=4")
SHORT = ("trainer.num_generations=2", "trainer.max_steps=2", "prompts=[]")
HANGS = re.compile(r"(a+)+$")


def judged(function: Callable[..., Any], texts: list[str], **scoring: Any) -> tuple[list[float | None], Guarded]:
    (reward,) = guarded([function], ScoringConfig(**scoring))
    prompts = ["?"] * len(texts)
    return reward(prompts=prompts, completions=texts, completion_ids=[[1]] * len(texts), answer=texts), reward


def test_a_reward_is_given_what_it_asks_for() -> None:
    def plain(completions: Any) -> list[float]:
        return [1.0] * len(completions)

    def columns(answer: Any, **rest: Any) -> list[float]:
        assert {"prompts", "completions", "completion_ids"} == set(rest)
        return [float(len(text)) for text in answer]

    async def waits(completions: Any) -> list[float]:
        return [2.0] * len(completions)

    assert judged(plain, ["a", "bb"])[0] == [1, 1]
    assert judged(columns, ["a", "bb"])[0] == [1, 2]
    assert judged(waits, ["a", "bb"])[0] == [2, 2]
    assert accepted(plain, {"completions": [], "answer": []}) == {"completions": []}
    assert judged(plain, [])[0] == []


def test_one_that_fails_costs_the_others_nothing() -> None:
    def score(text: str, row: Any) -> float:
        return 1 / len(row["answer"])

    values, reward = judged(one_by_one("score", score, weight=2.0), ["a", "", "bb"], default=-1.0)
    assert values == [2.0, -1.0, 1.0]
    assert (reward.failed, reward.judged) == (1, 3)
    # A function of the user's is called once for all, and fails for all.
    calls: list[int] = []

    def batch(completions: Any) -> list[float]:
        calls.append(len(completions))
        return [1 / len(text) for text in completions]

    first, reward = judged(batch, ["a"], default=-1.0)
    assert reward(prompts=["?"] * 3, completions=["a", "", "bb"]) == [-1.0] * 3
    assert (first, reward.failed, reward.judged, calls) == ([1.0], 3, 4, [1, 3])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (lambda completions: [1.0], "returned 1 values for 2 completions"),
        (lambda completions: [float("nan")] * 2, "not finite"),
        (lambda completions: ["many"] * 2, "ValueError"),
        (lambda completions: 1 / 0, "ZeroDivisionError"),
        (lambda completions: time.sleep(9), "longer than scoring.time_limit=0.2 s"),
        (lambda completions: HANGS.match("a" * 40 + "b"), "longer than scoring.time_limit=0.2 s"),
    ],
)
def test_one_that_never_works_ends_the_run(wrong, named) -> None:
    with pytest.raises(Refused, match="failed on all of the first 2 completions") as caught:
        judged(wrong, ["a", "b"], time_limit=0.2)
    assert named in str(caught.value)
    assert "ftcore reward" in str(caught.value)


def test_without_a_default_the_first_failure_ends_the_run() -> None:
    with pytest.raises(Refused, match="failed: it raised ZeroDivisionError"):
        judged(one_by_one("score", lambda text, row: 1 / len(text)), ["a", ""], default=None)


def test_what_does_not_apply_is_no_failure() -> None:
    values, reward = judged(one_by_one("score", lambda text, row: None), ["a", "b"], default=None)
    assert values == [None, None]
    assert reward.failed == 0


def test_a_reward_cannot_swallow_the_end_of_its_time() -> None:
    def stubborn(text: str, row: Any) -> float:
        try:
            time.sleep(5)
        except Exception:
            return 1.0
        return 1.0

    def score(text: str, row: Any) -> float:
        return stubborn(text, row) if text else 0.5

    began = time.monotonic()
    values, reward = judged(one_by_one("score", score), ["", "a"], time_limit=0.2)
    assert (values, reward.failed) == ([0.5, 0.0], 1)
    assert time.monotonic() - began < 3


def test_time_limits_outside_the_main_thread() -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(call_within(5, lambda: 7))
            call_within(0.1, time.sleep, 3)
        except OutOfTime:
            found.append("out of time")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [7, "out of time"]
    with pytest.raises(KeyError):
        call_within(5, {}.__getitem__, "no", in_thread=True)
    assert call_within(0, lambda: 3) == 3


MINE = '''
def even(completions, answer):
    """Fails on every second call after the first."""
    even.calls = getattr(even, "calls", 0) + 1
    if even.calls % 2 == 0:
        raise OSError("the service is away")
    return [2.0 for _ in answer]


def needs(completions, secret):
    return [0.0] * len(completions)
'''


def test_a_run_counts_failures_and_weighs_functions(in_tmp: Path, capsys) -> None:
    Path("mine.py").write_text(MINE)
    result = ftcore.run([*GRPO, *SHORT, "rewards=[mine.py:even]", "scoring.weights=[0.5]", "scoring.default=-3"])
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    one, two = (line for line in lines if "reward" in line)
    assert one["reward"] == 1.0
    assert "rewards/even/failures" not in one
    assert (two["reward"], two["rewards/even/failures"]) == (-3.0, 4)
    said = capsys.readouterr().out
    assert "reward even raised OSError: the service is away; such completions get -3" in said
    assert "reward even failed on 4 of 8 completions" in said


@pytest.mark.parametrize(
    ("words", "key", "text"),
    [
        ("rewards=[mine.py:needs]", "rewards", "asks for a column 'secret'"),
        ("rewards=[mine.py:even] scoring.weights=[1,2]", "scoring.weights", "2 numbers for 1"),
        ("rewards=[mine.py:even] scoring.time_limit=-1", "scoring.time_limit", "is -1"),
        ("rewards=[mine.py:even,other.py:even]", "rewards", "two rewards are called even"),
        ("+reward=[regex]", "reward.regex.pattern", "is empty"),
        ("+reward=[regex] 'reward.regex.pattern=\"(\"'", "reward.regex.pattern", "no regular expression"),
        ("+reward=[format] reward.format.tags=[a,a]", "reward.format.tags", "is ['a', 'a']"),
        ("+reward=[math] reward.math.column=right", "reward.math.column", "no column 'right' (they have answer"),
        ("+reward=[json_schema]", "reward.json_schema.schema", "no schema is given"),
        ("+reward=[json_schema] reward.json_schema.schema=no.json", "reward.json_schema.schema", "there is no file"),
        ("+reward=[json_schema] reward.json_schema.schema={type:thing}", "reward.json_schema.schema", "no JSON schema"),
        ("+reward=[reasoning_gym]", "reward.reasoning_gym", "rows of data=reasoning_gym only"),
    ],
)
def test_what_the_plan_refuses(in_tmp: Path, words: str, key: str, text: str) -> None:
    for name in ("mine.py", "other.py"):
        Path(name).write_text(MINE)
    problems = runs.refusals([*GRPO, *shlex.split(words)])
    assert [problem.key for problem in problems] == [key]
    assert text in problems[0].message
    assert problems[0].fix
