"""Chat templates of others: they touch nothing, cost little, and render what transformers would render."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from template_attacks import BOMBS, CANARY, INJECTIONS, LONG, TALK

from ftcore import templates
from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.chat import render
from ftcore.errors import Exit, Refused
from ftcore.template_limits import TEMPLATE
from ftcore.template_sandbox import rendered

SCRIPT = Path(__file__).with_name("template_attacks.py")
TELLTALE = ("<class", "<module", "<built-in", "<function", "<jinja2", "uid=", "root:", "environ(", CANARY)
WORDS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
}
TALKS: list[list[dict[str, Any]]] = [
    [],
    TALK[:1],
    TALK * 3,
    [{"role": "system", "content": "Be {x} %s"}, *TALK, TALK[0]],
    [{"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "image"}]}, TALK[1]],
    [TALK[0], CALL, {"role": "tool", "name": "f", "content": "4"}, {**TALK[1], "reasoning_content": "Hm."}],
]


@cache
def attacked(*which: str) -> dict[str, Any]:
    """What came of every attack, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *which],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "CANARY": CANARY},
        check=True,
    )
    return {(line := json.loads(text))["name"]: line for text in done.stdout.splitlines()}


def test_injections_touch_nothing_and_show_nothing() -> None:
    assert len(INJECTIONS) >= 40
    for text in INJECTIONS:
        line = attacked()[text]
        assert line["touched"] == [], text
        assert not any(word in line["output"] for word in TELLTALE), text


def stopped(lines: dict[str, Any], names: Collection[str]) -> None:
    """All were, by one clear error, in time, and in a process that stayed small."""
    for name in names:
        line = lines[name]
        assert line["error"].startswith("TooMuch: "), f"{name}: {line}"
        assert line["seconds"] <= 3, name
        # One rendering may grow the process by 256 MB; freed memory goes back, but not at once.
        assert line["peak"] <= 768, name


def test_bombs_are_stopped_in_time_and_in_little_memory() -> None:
    names = [name for name in BOMBS if name not in LONG]
    assert len(names) >= 30
    stopped(attacked(), names)


@pytest.mark.slow
def test_bombs_that_take_long_are_stopped_as_well() -> None:
    assert len(LONG & set(BOMBS)) == len(LONG) == 7
    stopped(attacked("long"), LONG)


def same(function: Any) -> tuple[str, str]:
    """What it returns, or how it fails: the error's name and words."""
    try:
        return function(), ""
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", templates.names())
def test_as_transformers_renders(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    text = templates.read(name)
    for talk in TALKS:
        for options in ({}, {"add_generation_prompt": True}, {"tools": [TOOL]}):
            theirs = same(
                lambda talk=talk, o=options: render_jinja_template([talk], chat_template=text, **o, **WORDS)[0][0]
            )
            assert same(lambda talk=talk, o=options: rendered(text, talk, **o, **WORDS)[0]) == theirs


def test_marks_as_transformers_sets_them() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    text = templates.read("qwen3_training")
    theirs = render_jinja_template([TALK * 2], chat_template=text, return_assistant_tokens_mask=True, **WORDS)[1][0]
    assert rendered(text, TALK * 2, **WORDS)[1] == theirs != []


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (BOMBS["only on a certain row"], "the chat template, given this row, makes more than 10 MB of text"),
        (BOMBS["a long template"], f"the chat template, given this row, is {TEMPLATE + 1:,} characters long"),
        (BOMBS["deep recursion"], "the chat template, given this row, goes too deep"),
    ],
)
def test_a_bomb_is_one_message(template: str, said: str) -> None:
    with pytest.raises(Refused) as refused:
        render(byte_tokenizer(template), TALK)
    assert refused.value.code == Exit.DATA
    assert refused.value.problems[0].key == "data.template"
    assert said in str(refused.value)
    assert "fix: set another data.template" in str(refused.value)


def test_a_file_that_is_too_long_is_refused_before_anything_else(tmp_path: Path) -> None:
    file = tmp_path / "long.jinja"
    file.write_text("x" * (TEMPLATE + 1))
    with pytest.raises(Refused, match=r"long\.jinja: is 100,001 characters long, and 100,000 is the most"):
        templates.read(str(file))
    file.write_text("{{ " + "(" * 40_000)
    with pytest.raises(Refused, match=r"long\.jinja:1: is no Jinja template"):
        templates.read(str(file))


def test_a_row_may_be_long() -> None:
    """A million characters in a hundred turns: far from the limits."""
    talk = [{"role": ("user", "assistant")[n % 2], "content": f"{n} " * 3_000} for n in range(100)]
    for name in ("chatml", "qwen3", "llama3_1"):
        assert len(rendered(templates.read(name), talk, **WORDS)[0]) > 800_000
