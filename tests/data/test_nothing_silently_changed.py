"""Rows in the forms of the wild say what they said: nothing is left out, added or put elsewhere without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import ftcore
from ftcore import hooks as h
from ftcore import pipeline
from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.chat import chat_encoder, training_texts
from ftcore.composition import compose, typed
from ftcore_data import alpaca, images, messages, preference, prompt_completion, prompts, sharegpt, tokens, unpaired

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
OTHER, SYSTEM = {"role": "assistant", "content": "What?"}, {"role": "system", "content": "Be brief."}


def formatted(*words: str) -> list[dict[str, Any]]:
    """The training rows of a plan."""
    hooks, plan = pipeline.prepare(typed(compose(["+model=llama", "model.tiny=true", *words])))
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    return list(hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)["train"])


def write(rows: list[Mapping[str, Any]], name: str = "rows.jsonl") -> str:
    Path(name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return f"data.path={name}"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi ", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [USER]),
        ({"prompt": "Hi", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [SYSTEM, USER]),
        (
            {"prompt": "Hi", "system": "Be brief.", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
            [SYSTEM, USER],
        ),
        ({"system": "Be brief.", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, [SYSTEM, USER]),
        ({"prompt": [USER], "system": "Be brief.", "chosen": "Hello.", "rejected": "What?"}, [SYSTEM, USER]),
        ({"prompt": "Hi", "chosen": [USER, ANSWER, USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]}, [
            USER, ANSWER, USER,
        ]),
    ],
)  # fmt: skip
def test_a_prompt_that_is_told_twice_is_asked_once(row: dict[str, Any], prompt: list[Any]) -> None:
    assert preference.check(row) is None
    assert preference.convert(row) == {"prompt": prompt, "chosen": [ANSWER], "rejected": [OTHER]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Other", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [OTHER]},
    ],
)
def test_answers_that_begin_with_something_else_are_refused(row: dict[str, Any]) -> None:
    assert "begin neither with the assistant nor with what 'prompt' says" in (preference.check(row) or "")


def test_the_system_s_words_are_told_once() -> None:
    row = {"prompt": "Hi", "chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}
    assert "a system message as well" in (preference.check(row | {"system": "Be long."}) or "")


TALK = [USER, ANSWER]
TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    ("form", "row", "column"),
    [
        (messages, {"messages": TALK}, "messages"),
        (sharegpt, {"conversations": TURNS}, "messages"),
        (images, {"images": ["a.png"], "messages": TALK}, "messages"),
        (images, {"images": ["a.png"], "conversations": TURNS}, "messages"),
        (unpaired, {"messages": TALK, "label": True}, "prompt"),
    ],
)
def test_a_column_of_the_system_s_words_is_told(form: Any, row: dict[str, Any], column: str) -> None:
    row = {"system": "Be brief.", **row}
    assert form.check(row) is None
    first = form.convert(row)[column][0]
    assert first["role"] == "system"
    assert first["content"] in ("Be brief.", [{"type": "text", "text": "Be brief."}])
    assert form.convert(row | {"system": None})[column][0]["role"] == "user"
    assert "not text" in form.check(row | {"system": 3})
    if "messages" in row:
        assert "as well" in form.check(row | {"messages": [SYSTEM, *TALK]})


def test_tools_beside_images_are_refused() -> None:
    row = {"images": ["a.png"], "messages": TALK, "tools": [{"name": "f"}]}
    assert "'tools'" in (images.check(row) or "")


def test_parts_that_are_text_are_text() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    row = {"messages": [{"role": "user", "content": parts}, ANSWER]}
    assert messages.check(row) is None
    assert messages.convert(row)["messages"][0] == {"role": "user", "content": "One\nTwo"}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"type": "string"}}}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}


def test_arguments_that_only_other_calls_have_are_not_added(in_tmp: Path) -> None:
    other = json.loads(json.dumps([TOOL, CALL]).replace('"a"', '"b"').replace('"f"', '"g"'))
    rows = [
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [tool]}
        for tool, call in ([TOOL, CALL], other)
    ]
    Dataset.from_list(rows).to_parquet("rows.parquet")
    words = ("+trainer=sft", "data.template=qwen3")
    assert formatted(*words, "data.path=rows.parquet") == formatted(*words, write(rows))
    given = {"a": None, "b": 1}  # in JSON, nothing is nothing
    call = {"type": "function", "function": {"name": "f", "arguments": given}}
    rows = [{"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [TOOL]}]
    (row,) = formatted(*words, write(rows))
    assert '"a": null' in byte_tokenizer().decode(row["input_ids"])


@pytest.mark.parametrize("at", [120, 0])
def test_a_column_that_few_rows_have(in_tmp: Path, at: int) -> None:
    rows = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(150)]
    rows[at] |= {"tools": [TOOL["function"]]}
    made = formatted("+trainer=dpo", "data=preference", "data.template=qwen3", write(rows))
    assert [i for i, row in enumerate(made) if row["tools"]] == [at]


def test_a_column_that_a_stream_has_later(in_tmp: Path) -> None:
    rows = [{"messages": [USER, ANSWER, USER, OTHER]} | ({"id": i} if i > 5 else {}) for i in range(8)]
    words = ("+trainer=sft", "trainer.max_steps=1", "data.template=qwen3")
    streamed = formatted(*words, write(rows), "data.streaming=true")
    whole = formatted(*words, write(rows))
    assert [row["input_ids"] for row in streamed] == [row["input_ids"] for row in whole]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_half_of_a_character_is_said_of_its_row(in_tmp: Path, name: str) -> None:
    bad = {"messages": [{"role": "user", "content": "Hi \ud83d"}, ANSWER]}
    whole = {"messages": [{"role": "user", "content": "Hi \U0001f600"}, ANSWER]}
    rows = [whole] * 200 + [bad]
    Path(name).write_text(json.dumps(rows) if name.endswith(".json") else "\n".join(map(json.dumps, rows)))
    with pytest.raises(ftcore.Refused, match=r"holds half of a character \(\\ud83d\)") as found:
        formatted("+trainer=sft", f"data.path={name}")
    assert found.value.problems[0].key.endswith("201")
    assert len(formatted("+trainer=sft", f"data.path={name}", "data.bad_rows=quarantine")) == 200


def test_what_tools_answer_is_not_left_out() -> None:
    talk = [USER, {"role": "assistant", "content": "Wait."}, {"role": "tool", "content": 'Sunny "today"'}, ANSWER]
    deaf, tells = byte_tokenizer(), byte_tokenizer()
    end = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    one = "<|im_start|>{{ m.role }}\n{{ m.content if m.role != 'tool' else m.content | tojson }}<|im_end|>\n"
    deaf.chat_template = f"{{% for m in messages if m.role != 'tool' %}}{one}{{% endfor %}}{end}"
    tells.chat_template = f"{{% for m in messages %}}{one}{{% endfor %}}{end}"
    with pytest.raises(ftcore.Refused, match=r"leaves out message 3 \(tool\)"):
        training_texts(chat_encoder(deaf), talk)
    assert "Sunny" in training_texts(chat_encoder(tells), talk)[0].text


IMAGE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}


@pytest.mark.parametrize(
    ("form", "row", "said"),
    [
        (unpaired, {"messages": TALK, "label": True, "tools": "no JSON"}, "not JSON"),
        (unpaired, {"messages": TALK, "label": True, "images": ["a.png"]}, "'images'"),
        (unpaired, {"messages": [IMAGE, ANSWER], "label": True}, "message 1 has an image"),
        (preference, {"prompt": [IMAGE], "chosen": "a", "rejected": "b"}, "message 1 has an image"),
        (prompt_completion, {"prompt": [IMAGE], "completion": [ANSWER]}, "message 1 has an image"),
        (prompts, {"prompt": [IMAGE]}, "message 1 has an image"),
        (images, {"images": ["a.png"], "messages": [SYSTEM, ANSWER]}, "no message of the user's"),
        (prompt_completion, {"question": "q", "context": "c", "answer": "a"}, "data.columns.output=answer"),
        (prompt_completion, {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}, "'tools'"),
        (alpaca, {"instruction": "q", "output": "a", "tools": [{"name": "f"}]}, "'tools'"),
        (alpaca, {"instruction": "q", "output": "a", "input": "i", "context": "c"}, "'context' as well"),
        (preference, {"question": "q", "chosen": "a", "rejected": "b", "context": "c"}, "'context'"),
        (preference, {"prompt": "q", "chosen": "a", "rejected": "b", "history": [["q", "a"]]}, "'history'"),
        (preference, {"input": "q", "chosen": "a", "rejected": "b"}, "data.columns.prompt=input"),
        (preference, {"chosen": "a", "rejected": "b", "system": "s"}, "'system'"),
        (preference, {"chosen": [*TALK, USER], "rejected": [USER, OTHER]}, "'chosen' does not end with the assistant"),
        (preference, {"chosen": TALK, "rejected": [USER, USER, OTHER]}, "'rejected' goes on with"),
        (sharegpt, {"conversations": [{"from": "human", "value": ["q"]}, *TURNS]}, "a list as content"),
        (messages, {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]}, "empty"),
        (
            messages,
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [1]}]}]},
            "no JSON",
        ),
        (tokens, {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]}, "'attention_mask' leaves out"),
        (tokens, {"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [0, 1]}, "'completion_mask' leaves out"),
        (prompts, {"prompt": [SYSTEM, USER], "system": "s"}, "as well"),
    ],
)
def test_what_would_be_lost_or_trained_by_mistake_is_refused(form: Any, row: dict[str, Any], said: str) -> None:
    assert said in (form.check(row) or "")


def test_masks_that_labels_keep_to_are_taken() -> None:
    row = {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0], "completion_mask": [0, 1, 0]}
    assert tokens.check(row | {"labels": [-100, 2, -100]}) is None
    assert tokens.check(row | {"attention_mask": [1, 1, 1], "completion_mask": None}) is None


@pytest.mark.parametrize("call", [{"name": "f"}, {"function": {"name": "f", "arguments": None}}])
def test_a_call_without_arguments_has_none(call: dict[str, Any]) -> None:
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    assert messages.check(row) is None
    assert messages.convert(row)["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


def test_an_input_of_white_space_is_none() -> None:
    row = {"instruction": "q", "input": " \n", "context": "c", "output": "a"}
    assert alpaca.check(row) is None
    assert alpaca.convert(row)["messages"][0]["content"] == "q\n\nc"


def test_the_system_s_words_are_told_before_a_prompt() -> None:
    row = {"prompt": "Hi", "system": "Be brief."}
    assert prompts.check(row) is None
    assert prompts.convert(row) == {"prompt": [SYSTEM, USER], "system": "Be brief."}
    other = {"prompt": "Hi", "system": 3}  # what a reward reads
    assert prompts.check(other) is None
    assert prompts.convert(other)["prompt"] == [USER]
