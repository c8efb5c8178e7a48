"""`data.columns`: the user's names, for every format, every kind of file, and every way to read."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ftcore import hooks as h
from ftcore.catalog import installed
from ftcore.columns import named, named_dataset
from ftcore.manager import import_function
from ftcore.rows import iter_rows
from ftcore.specs import DataFormat
from ftcore.testing import runs
from ftcore_data.auto import FORMATS

TINY = ("+model=qwen3", "model.tiny=true")
ROWS = [{"q": "What is 2+2?", "a": "Four.", "id": 1}, {"q": "And 3+3?", "a": "Six.", "id": 2}]
MAPPED = ("data.columns.prompt=q", "data.columns.completion=a")
PAIRS = [("What is 2+2?", "Four."), ("And 3+3?", "Six.")]


def form_of(name: str) -> DataFormat:
    form: DataFormat = installed().find("data", name).load().ftcore_data_format()
    return form


def written(file: str, rows: list[dict[str, Any]] = ROWS) -> str:
    if file.endswith(".csv"):
        with Path(file).open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.endswith(".json"):
        Path(file).write_text(json.dumps(rows), encoding="utf-8")
    else:
        Path(file).write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return f"data.path={file}"


def read(*words: str, split: str = "train") -> list[Mapping[str, Any]]:
    hooks, plan = runs.prepared([*TINY, "+trainer=sft", *words])
    rows: list[Mapping[str, Any]] = list(hooks.first(h.ftcore_load_dataset, plan=plan)[split])
    return rows


@pytest.mark.parametrize("streaming", [(), ("data.streaming=true", "trainer.max_steps=1")], ids=["whole", "streamed"])
@pytest.mark.parametrize("file", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_every_kind_of_file(file: str, streaming: tuple[str, ...], in_tmp: Path) -> None:
    rows = read(written(file), *MAPPED, *streaming)
    assert [(row["prompt"], row["completion"]) for row in rows] == PAIRS
    assert [str(row["id"]) for row in rows] == ["1", "2"], "other columns stay"
    assert not {"q", "a"} & set(rows[0])


def test_rows_held_out_and_several_files(in_tmp: Path) -> None:
    written("one.jsonl")
    written("two.csv", [{key: str(value) for key, value in row.items()} for row in ROWS])
    written("one.jsonl", [{key: str(value) for key, value in row.items()} for row in ROWS])
    words = ["data.path=[one.jsonl,two.csv]", "data.eval_path=two.csv", *MAPPED]
    assert [row["prompt"] for row in read(*words)] == [pair[0] for pair in PAIRS * 2]
    assert [row["prompt"] for row in read(*words, split="eval")] == [pair[0] for pair in PAIRS]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_its_rows_under_other_names(name: str) -> None:
    form = form_of(name)
    check, convert = import_function(form.check, "data"), import_function(form.convert, "data")
    for _, row in iter_rows(Path(form.sample)):
        other = {f"my {column}": value for column, value in row.items()}
        back = named(other, {column: f"my {column}" for column in row})
        assert check(back) is None
        assert convert(back) == convert(row)
        if form.columns:
            assert set(row) <= set(form.columns)


def test_the_format_is_detected_by_the_names_that_it_reads(in_tmp: Path) -> None:
    _, plan = runs.prepared([*TINY, "+trainer=sft", written("rows.jsonl"), *MAPPED])
    assert plan.format is not None
    assert plan.format.name == "prompt_completion"


def test_labels_are_found_under_other_names(in_tmp: Path) -> None:
    written("rows.jsonl", [{"review": "Fine.", "stars": "good"}, {"review": "Cold.", "stars": "bad"}])
    words = ["+model=modernbert", "model.tiny=true", "+trainer=classify", "data.path=rows.jsonl"]
    _, plan = runs.prepared([*words, "data.columns.text=review", "data.columns.label=stars"])
    assert plan.run.trainer.labels == ["bad", "good"]  # type: ignore[union-attr]


@pytest.mark.parametrize("in_memory", [True, False])
def test_columns_may_change_places(in_memory: bool) -> None:
    from datasets import Dataset

    columns = {"prompt": "completion", "completion": "prompt"}
    row = {"prompt": "Four.", "completion": "What is 2+2?"}
    rows = Dataset.from_list([row])
    (read,) = named_dataset(rows if in_memory else rows.to_iterable_dataset(), columns)
    assert read == {"prompt": "What is 2+2?", "completion": "Four."} == named(row, columns)


def test_a_column_that_is_not_meant_makes_room() -> None:
    from datasets import Dataset

    row = {"prompt": "the system's", "question": "Why?"}
    assert named(row, {"prompt": "question"}) == {"prompt": "Why?"}
    assert list(named_dataset(Dataset.from_list([row]), {"prompt": "question"})) == [{"prompt": "Why?"}]


def test_a_column_that_may_be_left_out_need_not_be_in_every_row(in_tmp: Path) -> None:
    rows = [{"do": "Say hello.", "said": "Hello."}, {"do": "Say bye.", "said": "Bye.", "rules": "Be short."}]
    words = ["data.columns.instruction=do", "data.columns.output=said", "data.columns.system=rules"]
    assert [row["system"] for row in read(written("rows.jsonl", rows), *words)] == [None, "Be short."]


@pytest.mark.parametrize("data", ["auto", "prompt_completion"])
def test_a_column_that_is_not_there(data: str, in_tmp: Path) -> None:
    words = [*TINY, "+trainer=sft", f"data={data}", written("rows.jsonl")]
    (problem,) = runs.refusals([*words, "data.columns.prompt=ques", "data.columns.completion=a"])
    assert problem.key == "rows.jsonl:1"
    assert problem.message == "has no column 'ques' (it has q, a, id), which data.columns.prompt names"
    assert "data.columns.prompt" in problem.fix


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        (["data=prompt_completion", "data.columns.promt=q"], "data.columns.promt", "did you mean data.columns.prompt?"),
        (["data=text", "data.columns.words=q"], "data.columns.words", "its columns: text"),
        (["data=prompt_completion", *MAPPED, "data.columns.response=a"], "data.columns.response", "one meaning"),
        (["data.columns.promt=q", "data.columns.completion=a"], "rows.jsonl:1", "did you mean data.columns.prompt for"),
    ],
)
def test_a_name_that_the_format_does_not_have(words: list[str], key: str, said: str, in_tmp: Path) -> None:
    (problem,) = runs.refusals([*TINY, "+trainer=sft", written("rows.jsonl"), *words])
    assert problem.key == key
    assert said in problem.fix


def test_the_shipped_rows_have_their_own_names(in_tmp: Path) -> None:
    (problem,) = runs.refusals([*TINY, "+trainer=sft", "data=text", "data.columns.text=q"])
    assert (problem.key, problem.fix) == ("data.columns", "set data.path")


@pytest.mark.parametrize("data", ["auto", "prompt_completion"])
def test_a_bad_row_is_told_by_both_names(data: str, in_tmp: Path) -> None:
    rows = [*ROWS, {"q": "And 4+4?", "a": " ", "id": 3}]
    (problem,) = runs.refusals([*TINY, "+trainer=sft", f"data={data}", written("rows.jsonl", rows), *MAPPED])
    assert problem.key == "rows.jsonl:3"
    assert problem.message.startswith("column 'completion' is empty (your 'a')")


def test_a_row_at_fault_for_its_tokenizer_is_found_again(in_tmp: Path) -> None:
    """Whether ids are the tokenizer's is known only once it is loaded: the row is looked up in the file again."""
    from ftcore import Refused

    words = [*TINY, "+trainer=sft", "data=tokens", "data.columns.input_ids=ids"]
    hooks, plan = runs.prepared([*words, written("rows.jsonl", [{"ids": [1, 2]}, {"ids": [1, 10**6]}])])
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    with pytest.raises(Refused) as refused:
        hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)
    assert refused.value.problems[0].key == "rows.jsonl:2"


def test_preview_shows_them(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ftcore.tasks.preview import main

    assert main([*TINY, "+trainer=sft", written("rows.jsonl"), *MAPPED, "preview.rows=1"]) == 0
    printed = capsys.readouterr().out
    assert "columns: prompt is your q, completion is your a" in printed
    assert "What is 2+2?[[Four." in printed
