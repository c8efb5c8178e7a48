"""No cache gives rows of another file, another tokenizer or an older plugin: each of twelve inputs changes the rows.

What `datasets` reads of a parquet file it keeps by the file's name and time; what it maps, by the function's name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftcore import hooks as h
from ftcore import pipeline
from ftcore.composition import compose, typed

TALKS = [
    [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": f"{word}!"}]
    for word in ("aaaa", "bbbb", "cccc", "dddd")
]
FILE = "x.parquet"


def write(talks: list[Any], name: str = FILE, **columns: list[Any]) -> None:
    """A parquet file of one size, in which nothing but the bytes says that it was written again."""
    when = os.stat(name).st_mtime_ns if Path(name).exists() else None
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    pq.write_table(pa.table({"messages": talks, **columns}), name, **options)
    if when is not None:
        os.utime(name, ns=(when, when))


def rows(*overrides: str) -> list[Any]:
    """What a trainer's library gets when it maps the rows once more, with its cache."""
    words = ["+model=qwen3", "model.tiny=true", "+trainer=sft", f"data.path={FILE}", "data=messages", *overrides]
    hooks, plan = pipeline.prepare(typed(compose(words)))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    made = hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)["train"]
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in made.map(same)]


def same(row: Any) -> Any:
    """Any step of a library, whose code never changes."""
    return row


def the_bytes_of_the_file(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    size = os.stat(FILE).st_size
    write([[{**m, "content": m["content"].replace("aaaa", "zzzz")} for m in talk] for talk in TALKS])
    assert os.stat(FILE).st_size == size
    return []


def the_order_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write(TALKS[::-1])
    return []


def another_file(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write(TALKS[:2], "y.parquet")
    return ["data.path=y.parquet"]


def the_order_of_the_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write(TALKS[1:], "y.parquet")
    return [f"data.path=[y.parquet,{FILE}]"]


def what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["data.eval_size=1"]


def the_seed_of_the_split(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["data.eval_size=2", "trainer.seed=1"]


def the_columns(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    write(TALKS, other=TALKS[::-1])
    return ["data.columns.messages=other"]


def the_template(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}"
    Path("t.jinja").write_text(turns + "{{ '<assistant>' if add_generation_prompt }}")
    return ["data.template=t.jinja"]


def the_longest_row(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["trainer.max_length=27"]


def what_is_masked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    more = [[*talk, {**talk[0], "weight": None}, {**talk[1], "weight": 0}] for talk in TALKS]
    write(more)
    return []


def the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return ["model.new_tokens=[aaaa]"]


def the_code_of_the_format(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Under the same name, as a newer version of a plugin has it."""

    def convert(row: Any) -> Any:
        return {"messages": [{**message, "content": message["content"].upper()} for message in row["messages"]]}

    convert.__module__, convert.__qualname__ = "ftcore_data.messages", "convert"
    monkeypatch.setattr("ftcore_data.messages.convert", convert)
    return []


INPUTS: list[Callable[[pytest.MonkeyPatch], list[str]]] = [
    the_bytes_of_the_file, the_order_of_the_rows, another_file, the_order_of_the_files, what_is_held_out,
    the_seed_of_the_split, the_columns, the_template, the_longest_row, what_is_masked, the_tokenizer,
    the_code_of_the_format,
]  # fmt: skip


@pytest.mark.parametrize("change", INPUTS, ids=lambda change: change.__name__)
def test_each_input_changes_the_rows(
    change: Callable[[pytest.MonkeyPatch], list[str]], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(TALKS)
    before = rows(*(["data.eval_size=2"] if change is the_seed_of_the_split else []))
    words = change(monkeypatch)
    after = rows(*words)
    assert after != before
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", in_tmp / "empty")
    assert rows(*words) == after, "what a machine gives that never saw the rows before"
    assert any((in_tmp / "empty").iterdir())


def test_the_same_inputs_give_the_same_rows(in_tmp: Path) -> None:
    write(TALKS)
    assert rows() == rows()
