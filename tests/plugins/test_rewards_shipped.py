"""The values of the shipped rewards, and what is never run to find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ftcore
from ftcore import hooks as h
from ftcore.cli import run as ftcore_command
from ftcore.rewards import text_of
from ftcore.testing import runs
from ftcore_rewards._harmless import ARITHMETIC, FORMULAS, LITERALS, harmless


def values(name: str, texts: list[str], *words: str, **columns: Any) -> list[float | None]:
    """What a reward says; every column is the same in all rows."""
    hooks, plan = runs.prepared([*runs.TINY, f"+reward=[{name}]", *words])
    (reward,) = hooks.collect(h.ftcore_rewards, plan=plan)
    rows = {column: [value] * len(texts) for column, value in columns.items()}
    return list(reward(prompts=["?"] * len(texts), completions=texts, **rows))


def test_math() -> None:
    texts = ["It is $\\frac{1}{2}$.", "\\boxed{0.5}", "2/4", "3/4", "", "half"]
    assert values("math", texts, answer="1/2") == [1, 1, 1, 0, 0, 0]
    assert values("math", ["72", "so 48 + 24 = 72", "71"], answer="48 / 2 = 24, 48 + 24 = 72\n#### 72") == [1, 1, 0]
    assert values("math", ["$x^2+2x+1$", "$(x+1)^2$", "$x$"], "reward.math.column=right", right="(x+1)^2") == [1, 1, 0]
    assert values("math", ["7"], answer="no mathematics here") == [None]


def test_math_judges_the_answer_and_not_the_thoughts() -> None:
    texts = [
        "<think>7 + 5 = 12</think><answer>49</answer>",
        "<think>7 + 5, or is it 13?</think><answer>12</answer>",
        "<think>Add them.</think>\n<answer>\n$12$\n</answer>",
        "<answer>13</answer> No: <answer>12</answer>",
        "<think>It is 12.</think> 13",
        "<think>13?</think> It is 12.",
        "<final>12</final>",
    ]
    assert values("math", texts, answer="12") == [0, 1, 1, 1, 0, 1, 0]
    assert values("math", ["<final>12</final> 3"], "reward.math.tag=final", answer="12") == [1]


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("x + 1", "$x+1$", "1"),
        ("5 - 2i", "$5-2i$", "2"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"$(3, \frac{\pi}{2})$", "3"),
        ("So it is 72 km.", "72", "71"),
        (r"12 \text{ miles}", "12", "13"),
        (r"2\sqrt{3} \text{ cm}", r"$2\sqrt{3}$", "2"),
        (r"36\pi \text{ cm}^2", r"$36\pi$", "36"),
        (r"\frac{3\pi}{4}\text{ cm}", r"$\frac{3\pi}{4}$", "3"),
    ],
)
def test_math_reads_the_row_s_answer_whole(answer: str, right: str, wrong: str) -> None:
    assert values("math", [right, wrong], answer=answer) == [1, 0]


def test_rewards_are_checked_on_renamed_columns(in_tmp: Path) -> None:
    Path("rows.jsonl").write_text('{"question": "7 + 5?", "solution": "12"}\n')
    words = [*runs.TINY, "+trainer=grpo", "+reward=[math]", "data.path=rows.jsonl"]
    assert runs.prepared([*words, "data.columns.answer=solution"])
    (problem,) = runs.refusals(words)
    assert problem.key == "reward.math.column"


def test_a_first_tag_that_the_template_writes_is_not_asked_of_the_completion() -> None:
    texts = ["a</think><answer>4</answer>", "<think>a</think><answer>4</answer>", "4"]
    assert values("format", texts, "reward.format.opened=true") == [1, 0, 0]
    assert values("format", texts) == [0, 1, 0]


def test_a_completion_s_parts_are_its_words() -> None:
    parts = [{"type": "text", "text": "4"}, {"type": "image"}, {"type": "text", "text": "2"}]
    assert text_of([{"role": "assistant", "content": parts}, {"role": "assistant", "content": None}]) == "42"


def test_format() -> None:
    good = "<think>a\nb</think>\n<answer>4</answer>"
    texts = [good, f" {good} ", f"So: {good}", good * 2, "<answer>4</answer>", "4"]
    assert values("format", texts) == [1, 1, 0, 0, 0, 0]
    assert values("format", texts, "reward.format.partial=true") == [1, 1, 0.5, 0, 0.25, 0]
    assert values("format", texts, "reward.format.tags=[answer]") == [0, 0, 0, 0, 1, 0]


def test_regex() -> None:
    texts = ["12", "It is 12.", "no", "1\n2"]
    assert values("regex", texts, r"reward.regex.pattern='\d'") == [1, 1, 0, 1]
    assert values("regex", texts, r"reward.regex.pattern='\d.*'", "reward.regex.whole=true") == [1, 0, 0, 1]


def test_json_schema(in_tmp: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    Path("s.json").write_text(json.dumps(schema))
    texts = ['{"n": 3}', '{"n": "3"}', "[1]", "{n: 3}", "", "[" * 100_000]
    words = ("reward.json_schema.schema=s.json",)
    assert values("json_schema", texts, *words) == [1, 0, 0, 0, 0, 0]
    assert values("json_schema", texts, *words, "reward.json_schema.partial=true") == [1, 0.5, 0.5, 0, 0, 0]


def test_reasoning_gym() -> None:
    rows: dict[str, Any] = {"question": "6 + 2 =", "answer": "8", "metadata": "{'source_dataset': 'chain_sum'}"}
    found = values("reasoning_gym", ["8", " 8\n", "9", "It is 8", ""], **rows)
    assert found == [1, 1, 0, pytest.approx(0.14, abs=0.2), 0]
    tagged = ["<answer>8</answer>", "<answer>1</answer> no: <answer> 8 </answer>", "8"]
    assert values("reasoning_gym", tagged, "reward.reasoning_gym.tag=answer", **rows) == [1, 1, 0]


BAD = ("__import__('os').system('touch run')", "open('run','w')", "[open('run', 'w')]", "(lambda: open('run','w'))()")


def test_what_a_model_wrote_is_never_run(in_tmp: Path) -> None:
    """Some of reasoning-gym's scorers call `eval` on the answer."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    for task in sorted(LITERALS | FORMULAS | ARITHMETIC):
        entry = reasoning_gym.create_dataset(task, size=1, seed=3)[0]
        row = {"question": entry["question"], "answer": entry["answer"], "metadata": repr(entry["metadata"])}
        assert values("reasoning_gym", list(BAD), **row) == [0] * len(BAD), task
        if entry["answer"] is not None:
            assert values("reasoning_gym", [str(entry["answer"])], **row)[0] == 1, task
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("task", "good", "bad"),
    [
        ("countdown", ["(3 + 4) * 5 - 6/2"], ["9**9", "9^9", "exit()", "1e9", "f(2)"]),
        ("simple_integration", ["x**3/3 + C", "2*sin(x)**2 - exp(x)", "x^(1/2)"], ["9**9**9", "9**(9**9)", "2**999"]),
        ("polynomial_multiplication", ["x**2*y - 3"], ["x.y", "x['a']", "lambda: 1", "_x", "(" * 30 + "x", "x" * 500]),
        ("n_queens", ["_ Q\nQ _", "[['_', 'Q'], ['Q', '_']]"], ["[print()]", "__import__('os')"]),
        ("chain_sum", ["anything at all()"], []),
    ],
)
def test_harmless(task: str, good: list[str], bad: list[str]) -> None:
    assert [answer for answer in good if not harmless(answer, task)] == []
    assert [answer for answer in bad if harmless(answer, task)] == []
    towers = "(" * 6 + "9" + "**9)" * 6 + "**9"
    assert not harmless(towers, "simple_integration")


ANSWERS = [
    {"prompt": "2 + 3?", "completion": "It is \\boxed{5}.", "answer": "5"},
    {"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "6"}], "answer": "5"},
]


def test_reward_command_judges_the_column_that_is_named(in_tmp: Path, capsys) -> None:
    row = {"completion": "not meant", "output": "It is \\boxed{5}.", "solution": "5"}
    Path("rows.jsonl").write_text(json.dumps(row))
    words = ["data.path=rows.jsonl", "data.columns.completion=output", "data.columns.answer=solution"]
    assert ftcore_command(["reward", "+reward=[math]", *words]) == 0
    line = capsys.readouterr().out.splitlines()[1].split()
    assert line[1] == "1"
    assert "not" not in line


def test_reward_command(in_tmp: Path, capsys) -> None:
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ANSWERS)))
    own = "def words(completions):\n    return [len(c[0]['content'].split()) for c in completions]\n"
    Path("mine.py").write_text(own)
    words = ["reward", "+reward=[math]", "reward.math.weight=2", "rewards=[mine.py:words]", "data.path=rows.jsonl"]
    assert ftcore_command(words) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["row", "words", "math", "sum", "completion"]
    assert table[1] == ["1", "3", "2", "5", "It", "is", "\\boxed{5}."]
    assert table[2] == ["2", "1", "0", "1", "6"]
    assert table[3] == ["mean", "2", "1", "3"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.path=rows.jsonl", "no reward is selected"),
        ("+reward=[length]", "there are no completions to judge"),
        ("+reward=[length] data.path=no.jsonl", "there is no file no.jsonl"),
        ("+reward=[length] data.path=bare.jsonl", "bare.jsonl:1: has no 'completion'"),
        ("+reward=[math] reward.math.column=x data.path=rows.jsonl", "the rows have no column 'x'"),
        ("rewards=[no.py:f] data.path=rows.jsonl", "there is no file no.py"),
    ],
)
def test_reward_command_refuses(in_tmp: Path, capsys, words: str, said: str) -> None:
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ANSWERS)))
    Path("bare.jsonl").write_text('{"prompt": "2 + 3?"}\n')
    assert ftcore_command(["reward", *words.split()]) != 0
    error = capsys.readouterr().err
    assert said in error
    assert "fix: " in error or "no reward is selected" in said


def test_puzzles_are_made_and_judged(in_tmp: Path) -> None:
    """Without a path rows are made, held-out ones by another seed, and their own scorer is the reward."""
    seen: dict[str, Any] = {}

    @ftcore.hookimpl(wrapper=True)
    def ftcore_make_trainer(dataset: Any):
        seen.update(dataset)
        return (yield)

    words = ["+model=qwen3", "model.tiny=true", "+trainer=grpo", "data=reasoning_gym", "data.task=leg_counting"]
    words += ["data.size=6", "data.eval_size=3", "data.system=Be brief.", "trainer.num_generations=2"]
    short = ["trainer.max_completion_length=4", "trainer.global_batch=4", "trainer.max_steps=1", "prompts=[]"]
    result = ftcore.run([*words, *short], plugins=[ftcore_make_trainer])
    assert (len(seen["train"]), len(seen["eval"])) == (6, 3)
    assert not {*seen["train"]["question"]} & {*seen["eval"]["question"]}
    assert [message["role"] for message in seen["train"][0]["prompt"]] == ["system", "user"]
    assert "rewards/reasoning_gym/mean" in (result.output_dir / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["data.task=leg_count"], "data.task"),
        (["data.options={feet: 2}"], "data.options"),
        (["data.size=0"], "data.size"),
        (["data.streaming=true", "trainer.max_steps=2"], "data.streaming"),
    ],
)
def test_puzzles_that_cannot_be_made(words: list[str], key: str) -> None:
    problems = runs.refusals([*runs.TINY, "+trainer=grpo", "data=reasoning_gym", *words])
    assert [problem.key for problem in problems] == [key]
    assert problems[0].fix
