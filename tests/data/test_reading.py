"""Rows on their way to the trainer: exact, mixed, streamed, split, and refused with file and line."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ftcore import hooks as h
from ftcore import pipeline
from ftcore.composition import compose, typed
from ftcore.errors import Exit, Refused
from ftcore.readers import iter_rows
from ftcore.rows import local_files
from ftcore.specs import Shape
from ftcore.tokens import IGNORED

TINY = ("+model=qwen3", "model.tiny=true", "+trainer=sft")
FIXTURES = Path(__file__).parent / "fixtures"


def dataset(*overrides: str, raw: bool = False) -> tuple[Any, Any]:
    """The formatted (or raw) splits of a run, and its tokenizer."""
    hooks, plan = pipeline.prepare(typed(compose([*TINY, *overrides])))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    rows = hooks.first(h.ftcore_load_dataset, plan=plan)
    return rows if raw else hooks.first(
        h.ftcore_format_dataset, plan=plan, dataset=rows, tokenizer=tokenizer
    ), tokenizer


def texts(rows: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row["input_ids"]) for row in rows]


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return name


def numbered(name: str, letter: str, count: int) -> str:
    return write(name, [{"text": f"{letter}{number}"} for number in range(count)])


def test_objects_keep_their_own_keys_nulls_and_numbers() -> None:
    """Arrow alone would give each tool call the arguments of all others, and round its numbers."""
    rows, _ = dataset(f"data.path={FIXTURES}/tools.jsonl", "data.template=qwen2_5", raw=True)
    calls = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in rows["train"]]
    assert [set(call) for call in calls] == [{"x"}, {"place", "unit"}]
    made, tokenizer = dataset(f"data.path={FIXTURES}/tools.jsonl", "data.template=qwen2_5")
    text = "\n".join(texts(made["train"], tokenizer))
    assert '"arguments": {"x": 0.12345678901234568}' in text
    assert '"arguments": {"place": "Rome", "unit": null}' in text


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-20, 2**53 + 1, 123456789012345678, "42", "null", {"a": []}, []])
def test_any_argument_arrives_as_it_was_written(in_tmp: Path, value: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"value": value}}}
    talk = [{"role": "user", "content": "Go"}, {"role": "assistant", "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    path = write(
        "rows.jsonl",
        [
            {"messages": talk, "tools": tools},
            {"messages": [*talk[:1], {"role": "assistant", "content": "No"}], "tools": tools},
        ],
    )
    made, tokenizer = dataset(f"data.path={path}", "data.template=qwen2_5")
    assert f'"arguments": {json.dumps({"value": value})}' in tokenizer.decode(made["train"][0]["input_ids"])


def test_table_cells_stay_what_they_are() -> None:
    made, tokenizer = dataset(f"data.path={FIXTURES}/prompt_completion.csv")
    assert texts(made["train"], tokenizer) == ["2+2=4<|im_end|>", "01001nine<|im_end|>"]


def test_json_lines_and_wrapped_lists_read_like_lists() -> None:
    read = [
        dataset(f"data.path={FIXTURES}/messages{end}")[0]["train"][:]
        for end in (".jsonl", ".json", "_in_data.json", "_lines.json", ".parquet")
    ]
    assert all(rows == read[0] for rows in read)


def test_several_paths_are_joined(in_tmp: Path) -> None:
    paths = f"data.path=[{numbered('a.jsonl', 'a', 3)},{numbered('b.jsonl', 'b', 2)}]"
    made, tokenizer = dataset(paths)
    assert texts(made["train"], tokenizer) == [f"{t}<|im_end|>" for t in ("a0", "a1", "a2", "b0", "b1")]
    made, _ = dataset(paths, "data.eval_size=2")
    assert (len(made["train"]), len(made["eval"])) == (3, 2)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_weights_say_how_often_each_path_is_drawn_from(in_tmp: Path, streaming: str) -> None:
    paths = f"data.path=[{numbered('a.jsonl', 'a', 400)},{numbered('b.jsonl', 'b', 400)}]"
    stream = [f"data.streaming={streaming}", *(["trainer.max_steps=1"] if streaming == "true" else [])]
    made, tokenizer = dataset(paths, "data.weights=[3,1]", *stream)
    drawn = texts(made["train"], tokenizer)
    share = Counter(text[0] for text in drawn)
    assert 0.7 < share["a"] / len(drawn) < 0.8
    assert len(set(drawn)) == len(drawn), "no row comes twice"
    again, _ = dataset(paths, "data.weights=[3,1]", *stream)
    assert texts(again["train"], tokenizer) == drawn, "the seed decides"


def test_streams_give_the_same_rows(in_tmp: Path) -> None:
    for name in ("messages.jsonl", "tools.jsonl", "messages.parquet", "alpaca.csv", "folder"):
        whole, _ = dataset(f"data.path={FIXTURES}/{name}", "data.template=qwen2_5")
        stream, _ = dataset(
            f"data.path={FIXTURES}/{name}", "data.template=qwen2_5", "data.streaming=true", "trainer.max_steps=1"
        )
        assert [dict(row) for row in stream["train"]] == [dict(row) for row in whole["train"]], name
    held, _ = dataset(
        f"data.path={numbered('c.jsonl', 'c', 5)}", "data.streaming=true", "trainer.max_steps=1", "data.eval_size=2"
    )
    assert (len(list(held["train"])), len(list(held["eval"]))) == (3, 2)


def test_a_run_on_a_stream_and_on_a_mixture_trains(in_tmp: Path) -> None:
    from ftcore import run

    few = ["trainer.max_steps=2", "trainer.global_batch=2", "trainer.max_length=256"]
    streamed = run([*TINY, *few, f"data.path={FIXTURES}/messages.jsonl", "data.streaming=true", "output_dir=stream"])
    assert streamed.metrics["loss_last"] > 0
    paths = f"data.path=[{numbered('a.jsonl', 'a', 9)},{numbered('b.jsonl', 'b', 9)}]"
    mixed = run([*TINY, *few, paths, "data.weights=[1,1]", "data.eval_size=2", "output_dir=mixed"])
    assert mixed.metrics["eval_loss"] > 0


def test_tokens_go_as_they_are_and_strange_ones_are_refused(in_tmp: Path) -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    made, _ = dataset(f"data.path={write('rows.jsonl', rows)}")
    assert [dict(row) for row in made["train"]] == rows
    from ftcore.bytes_tokenizer import byte_tokenizer
    from ftcore.tokens import RowTokenizer

    tokenize = RowTokenizer(byte_tokenizer(), Shape.TOKENS, 2)
    assert tokenize(rows[0]) == [{"input_ids": [1, 2], "labels": [IGNORED, 2]}]
    with pytest.raises(Refused, match="token id 259 is none of the tokenizer's 259"):
        tokenize({"input_ids": [259]})


def test_media_are_found_beside_the_rows(in_tmp: Path) -> None:
    from ftcore.tasks import preview

    (in_tmp / "elsewhere").mkdir()
    rows = [{"audio": "a.wav", "text": "a"}]
    Path("elsewhere/rows.jsonl").write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(Refused, match=r"rows\.jsonl:1: column 'audio': there is no file a\.wav"):
        preview.main([*TINY[:2], "data.path=elsewhere/rows.jsonl"])
    Path("elsewhere/a.wav").write_bytes(b"RIFF")
    with pytest.raises(Refused, match=r"rows\.jsonl:1: elsewhere/a\.wav is no recording that can be read"):
        preview.main([*TINY[:2], "data.path=elsewhere/rows.jsonl"])
    Path("elsewhere/a.wav").write_bytes((FIXTURES / "media/low.wav").read_bytes())
    assert preview.main([*TINY[:2], "data.path=elsewhere/rows.jsonl"]) == 0


def test_a_row_that_the_template_does_not_take_is_named(in_tmp: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    bad = {"messages": [{"role": "system", "content": "s"}, *good["messages"]]}
    path = write("rows.jsonl", [good, good, bad])
    with pytest.raises(Refused, match=r"rows\.jsonl:3: the chat template does not take this row: System role not"):
        dataset(f"data.path={path}", "data.template=gemma")


SHAPES = {
    "preference": ("preference.jsonl", [{"role": "user", "content": "Hi"}]),
    "preference_implicit": ("preference_implicit.jsonl", [{"role": "user", "content": "Hi"}]),
    "preference_sharegpt": ("preference_sharegpt.json", [{"role": "user", "content": "Hi"}]),
    "preference_orca": (
        "preference_orca.jsonl",
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
    ),
    "preference_alpaca": ("preference_alpaca.jsonl", [{"role": "user", "content": "Say hi."}]),
    "unpaired": ("unpaired.csv", [{"role": "user", "content": "Hi"}]),
    "unpaired_messages": ("unpaired_messages.json", [{"role": "user", "content": "Hi"}]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_prompts_of_every_spelling_become_one(case: str) -> None:
    from ftcore.manager import import_function
    from ftcore.rows import iter_rows
    from ftcore_data.auto import Config, ftcore_data_format

    name, prompt = SHAPES[case]
    form = ftcore_data_format(Config(path=str(FIXTURES / name)))
    _, row = next(iter_rows(FIXTURES / name))
    made = import_function(form.convert, "data")(row)
    assert made["prompt"] == prompt
    for answer in {"chosen", "rejected", "completion"} & set(made):
        assert [m["role"] for m in made[answer]] == ["assistant"]
    assert made.get("label", True) is True


def test_images_stand_where_the_words_say() -> None:
    from ftcore_data.images import convert

    asked = {"role": "user", "content": "See <image> and\n<image>\nthere."}
    answer = {"role": "assistant", "content": "Yes."}
    parts = convert({"images": ["a.png", "b.png"], "messages": [asked, answer]})["messages"][0]["content"]
    assert parts == [
        {"type": "text", "text": "See "},
        {"type": "image"},
        {"type": "text", "text": " and"},
        {"type": "image"},
        {"type": "text", "text": "there."},
    ]
    first = convert({"image": "a.png", "messages": [{"role": "user", "content": "What?"}, answer]})
    assert first["images"] == ["a.png"]
    assert first["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_rows_are_refused_before_the_model_is_loaded(in_tmp: Path) -> None:
    import ftcore

    @ftcore.hookimpl
    def ftcore_load_model(plan: Any) -> None:
        raise AssertionError("weights are read")

    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write("rows.jsonl", [{"messages": talk}])
    with pytest.raises(Refused, match=r"rows\.jsonl:1: the chat template does not take this row"):
        ftcore.run([*TINY, f"data.path={path}", "data.template=gemma"], plugins=[ftcore_load_model])


def test_the_command_line_names_the_row_in_two_lines(ftcore_cli: Any, in_tmp: Path) -> None:
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write("rows.jsonl", [{"messages": talk[1:]}, {"messages": talk}])
    done = ftcore_cli("preview", *TINY, f"data.path={path}", "data.template=gemma")
    assert done.returncode == Exit.DATA
    assert done.stderr.startswith("ftcore: rows.jsonl:2: the chat template does not take this row: System role not")
    assert len(done.stderr.splitlines()) == 2


def test_preview_shows_what_is_trained_byte_for_byte(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text of the preview, without its marks, is the decoded ids of training."""
    from ftcore import cli

    sly = "Say <|im_end|> and café 🦙 [x]"
    talk = [{"role": "user", "content": sly}, {"role": "assistant", "content": "\n  Ok 🦙.\n"}]
    words = [f"data.path={write('rows.jsonl', [{'messages': talk}])}", "data.template=qwen2_5"]
    made, tokenizer = dataset(*words)
    row = made["train"][0]
    assert cli.run(["preview", *TINY, *words]) == 0
    shown = capsys.readouterr().out
    text = tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    answer = tokenizer.decode([label for label in row["labels"] if label != IGNORED], skip_special_tokens=False)
    assert answer == "\n  Ok 🦙.\n<|im_end|>"
    assert text.replace(answer, f"[[{answer}]]") in shown
    assert sly in shown


def test_files_of_windows_and_long_fields_are_read(in_tmp: Path) -> None:
    marked = "\ufeff" + json.dumps({"text": "hello"}) + "\n"
    Path("marked.jsonl").write_text(marked, encoding="utf-8")
    Path("long.csv").write_text("\ufefftext\n" + "x" * 200_000 + "\n", encoding="utf-8")
    assert dataset("data.path=marked.jsonl", raw=True)[0]["train"]["text"] == ["hello"]
    assert [len(text) for text in dataset("data.path=long.csv", raw=True)[0]["train"]["text"]] == [200_000]


@pytest.mark.parametrize(
    ("name", "header", "said"),
    [
        ("a.csv", "instruction,instruction,output", "has the column 'instruction' twice"),
        ("a.csv", "instruction;output", "is separated by semicolons, not by commas"),
        ("a.csv", "instruction\toutput", "is separated by tabs, not by commas"),
        ("a.tsv", "instruction,output", "is separated by commas, not by tabs"),
    ],
)
def test_a_table_whose_columns_are_not_what_they_seem(in_tmp: Path, name: str, header: str, said: str) -> None:
    Path(name).write_text(f"{header}\na,b,c\n")
    with pytest.raises(Refused, match=said) as found:
        list(iter_rows(Path(name)))
    assert found.value.problems[0].key == f"{name}:1"
    assert found.value.problems[0].fix


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ('a,b\n1,2\n"3,4\n5,6\n', "t.csv:3", "has a quote that is not closed"),
        ('a,b\n"1" x,2\n3,4\n', "t.csv:2", "goes on behind a quote that is closed"),
        ('a,b\n1,"2\n3,4\n5,"6"\n', "t.csv:2", "goes on behind a quote that is closed"),
        ("a,b\r1,2\r", "t.csv:1", "has line ends of an old kind"),
    ],
)
def test_a_quote_takes_no_rows_into_its_field(in_tmp: Path, text: str, place: str, said: str) -> None:
    Path("t.csv").write_bytes(text.encode())
    with pytest.raises(Refused, match=said) as found:
        list(iter_rows(Path("t.csv")))
    assert found.value.problems[0].key == place


def test_a_bad_quote_within_its_line_is_one_bad_row(in_tmp: Path) -> None:
    Path("t.csv").write_text('a,b\n"1" x,2\n3,4\n')
    aside: list[Any] = []
    assert list(iter_rows(Path("t.csv"), aside.append)) == [("t.csv:3", {"a": "3", "b": "4"})]
    assert [problem.key for problem in aside] == ["t.csv:2"]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.jsonl", "val.jsonl"),
        ("mine_train.jsonl", "mine-test.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("data-train-00000.csv", "more/validation_1.csv"),
    ],
)
def test_rows_to_hold_out_are_not_trained_by_their_folder(tmp_path: Path, train: str, test: str) -> None:
    for name in (train, test):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with pytest.raises(Refused, match="holds both"):
        local_files(str(tmp_path))


def test_endings_may_be_in_capitals(in_tmp: Path) -> None:
    Path("rows").mkdir()
    write("rows/a.jsonl", [{"text": "one"}])
    write("rows/B.JSONL", [{"text": "two"}])
    assert dataset("data.path=rows", raw=True)[0]["train"]["text"] == ["two", "one"]


@pytest.mark.parametrize("policy", ["stop", "quarantine"])
@pytest.mark.parametrize("first", [{}, {"input": None}])
def test_parquet_files_of_a_folder_may_have_other_columns(in_tmp: Path, first: dict[str, Any], policy: str) -> None:
    from pyarrow import Table, parquet

    row = {"instruction": "Hi", "output": "Ho"}
    Path("rows").mkdir()
    for name, columns in (("a", first), ("b", {"input": "there"})):
        parquet.write_table(Table.from_pylist([{**row, **columns}]), f"rows/{name}.parquet")
    made = dataset("data.path=rows", f"data.bad_rows={policy}", raw=True)[0]["train"]
    assert made["input"] == [None, "there"]


def test_parquet_files_of_a_folder_with_other_kinds_are_refused(in_tmp: Path) -> None:
    from pyarrow import Table, parquet

    Path("rows").mkdir()
    for name, number in (("a", 1), ("b", "x")):
        parquet.write_table(Table.from_pylist([{"text": "Hi", "id": number}]), f"rows/{name}.parquet")
    with pytest.raises(Refused, match="rows: the files hold columns of different kinds"):
        dataset("data.path=rows", raw=True)


@pytest.mark.parametrize(
    "words", [["data.weights=[1,1]"], ["data.streaming=true", "trainer.max_steps=1"]], ids=["weights", "stream"]
)
def test_holding_out_every_row_is_refused(in_tmp: Path, words: list[str]) -> None:
    paths = f"data.path=[{numbered('a.jsonl', 'a', 3)},{numbered('b.jsonl', 'b', 2)}]"
    with pytest.raises(Refused, match="leaves none to train on"):
        dataset(paths, "data.eval_size=6", *words, raw=True)


@pytest.mark.parametrize("words", [[], ["data.streaming=true", "trainer.max_steps=1"]], ids=["whole", "stream"])
def test_objects_of_parquet_and_of_json_lines_are_joined(in_tmp: Path, words: list[str]) -> None:
    from pyarrow import Table, parquet

    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    talks = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        [{"role": "user", "content": "Do"}, {"role": "assistant", "content": "", "tool_calls": [call]}],
    ]
    rows = [{"messages": talk, "id": number} for number, talk in enumerate(talks)]
    parquet.write_table(Table.from_pylist(rows), "a.parquet")
    paths = f"data.path=[a.parquet,{write('b.jsonl', rows)}]"
    made, tokenizer = dataset(paths, "data.template=qwen2_5", *words)
    first, second, *others = texts(made["train"], tokenizer)
    assert others == [first, second]
    assert '{"a": 1}' in second


def test_a_column_of_several_kinds_is_named(in_tmp: Path) -> None:
    path = write("a.jsonl", [{"text": "a", "id": 1}, {"text": "b", "id": "x"}])
    with pytest.raises(Refused, match="column 'id' holds values of several kinds") as found:
        dataset(f"data.path={path}", raw=True)
    assert found.value.problems[0].key == path


def test_rows_that_are_cut_are_counted(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write("a.jsonl", [{"text": "x" * 50}, {"text": "y" * 5}])
    dataset(f"data.path={path}", "trainer.max_length=40")
    assert "1 of 2 train rows fill trainer.max_length=40: what was longer is cut off" in capsys.readouterr().out
    dataset(f"data.path={path}", "trainer.max_length=400")
    assert "cut off" not in capsys.readouterr().out
