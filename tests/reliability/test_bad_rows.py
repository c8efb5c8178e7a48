"""Bad rows: each kind is found with its place before any weight is read; few of them can be put aside instead."""

from __future__ import annotations

import json
import wave
from pathlib import Path
from typing import Any

import pytest

from ftcore import hookimpl, pipeline
from ftcore import hooks as h
from ftcore.composition import compose, typed
from ftcore.errors import Exit, Refused

TINY = ("+model=qwen3", "model.tiny=true")
SFT = (*TINY, "+trainer=sft")
USER = {"role": "user", "content": "Hi"}
SAYS = {"role": "assistant", "content": "Hello."}
GOOD = {"messages": [USER, SAYS]}


def lines(*rows: Any) -> bytes:
    """Rows as JSON lines; text and bytes as they are."""
    whole = (row if isinstance(row, (str, bytes)) else json.dumps(row) for row in rows)
    return b"".join((row.encode() if isinstance(row, str) else row) + b"\n" for row in whole)


def parquet(*rows: dict[str, Any]) -> bytes:
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def image(name: str, cut: int | None = None) -> str:
    import PIL.Image

    PIL.Image.frombytes("RGB", (64, 64), bytes(range(256)) * 48).save(name)
    Path(name).write_bytes(Path(name).read_bytes()[:cut])
    return name


def recording(name: str) -> str:
    with wave.open(name, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(3200))
    return name


def about(picture: str) -> dict[str, Any]:
    return {"images": [picture], **GOOD}


PAIR = {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go."}
JUDGED = {"prompt": "Hi", "completion": "Hello.", "label": True}
CLASS = {"text": "Hi", "label": 1}
IDS = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"arguments": {}}}]}
GEMMA = (*SFT, "data.template=gemma")
SEES = ("+model=qwen2_5_vl", "model.tiny=true", "+trainer=sft")
HEARS = ("+model=whisper", "model.tiny=true", "+trainer=speech")


def says(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


# Name: command, file, its bytes (or what makes them in the folder), place, and a part of the reason.
CASES: dict[str, tuple[tuple[str, ...], str, Any, str, str]] = {
    "broken JSON": (SFT, "x.jsonl", lines(GOOD, GOOD, '{"messages": ['), "x.jsonl:3", "is not JSON"),
    "no object": (SFT, "x.jsonl", lines(GOOD, "[1, 2]"), "x.jsonl:2", "is a list, not an object"),
    "empty file": (SFT, "x.jsonl", b"", "x.jsonl", "holds no rows"),
    "empty table": (SFT, "x.csv", b"", "x.csv", "holds no rows"),
    "bad UTF-8": (SFT, "x.jsonl", lines(GOOD, b'{"messages": "\xff"}'), "x.jsonl:2", "is not UTF-8"),
    "bad UTF-8 in a table": (SFT, "x.csv", b"text\nab\n\xffb\n", "x.csv:3", "is not UTF-8"),
    "NaN": (SFT, "x.jsonl", lines({"text": "a"}, '{"text": NaN}'), "x.jsonl:2", "'text' is null"),
    "missing column": (SFT, "x.jsonl", lines(GOOD, {"talk": []}), "x.jsonl:2", "has no column 'messages'"),
    "two formats in one file": (SFT, "x.jsonl", lines(*[GOOD] * 30, PAIR), "x.jsonl:31", "has no column 'messages'"),
    "missing cell": (SFT, "x.csv", b"prompt,completion\na,b\nc\n", "x.csv:3", "'completion' is null"),
    "content null": (
        SFT, "x.jsonl", lines(GOOD, says(USER, {**SAYS, "content": None})), "x.jsonl:2", "null as content",
    ),
    "empty conversation": (SFT, "x.jsonl", lines(GOOD, says()), "x.jsonl:2", "is an empty conversation"),
    "content a number": (
        SFT, "x.jsonl", lines(GOOD, says(USER, {**SAYS, "content": 4})), "x.jsonl:2", "a number as content",
    ),
    "unknown role": (
        SFT, "x.jsonl", lines(GOOD, says({**USER, "role": "boss"}, SAYS)), "x.jsonl:2", "unknown role 'boss'",
    ),
    "nothing to train": (SFT, "x.jsonl", lines(GOOD, says(USER)), "x.jsonl:2", "has no assistant message"),
    "two users in a row": (GEMMA, "x.jsonl", lines(GOOD, says(USER, USER, SAYS)), "x.jsonl:2", "must alternate"),
    "empty completion": (
        SFT, "x.jsonl", lines(*[{"prompt": "a", "completion": c} for c in "b "]), "x.jsonl:2", "is empty",
    ),
    "a call of nothing": (SFT, "x.jsonl", lines(GOOD, says(USER, CALL)), "x.jsonl:2", "a tool call without a name"),
    "ids unknown": (SFT, "x.jsonl", lines(IDS, {"input_ids": [1, 9999]}), "x.jsonl:2", "the token id 9999 is none of"),
    "chosen is rejected": (
        (*TINY, "+trainer=dpo"), "x.jsonl", lines(PAIR, {**PAIR, "rejected": "Hello."}), "x.jsonl:2", "the same answer",
    ),
    "label no truth": (
        (*TINY, "+trainer=kto"), "x.jsonl", lines(JUDGED, {**JUDGED, "label": 0.5}), "x.jsonl:2", "not true or false",
    ),
    "label NaN": (
        (*TINY, "+trainer=classify"), "x.parquet",
        lambda: parquet(*[{**CLASS, "label": n} for n in (1.0, 2.0, float("nan"))]),
        "x.parquet: row 3", "'label' is nan, not a class",
    ),
    "null in parquet": (
        SFT, "x.parquet", lambda: parquet({"text": "a"}, {"text": None}), "x.parquet: row 2", "'text' is null",
    ),
    "missing image": (
        SEES, "x.jsonl", lambda: lines(about(image("a.png")), about("b.png")), "x.jsonl:2", "there is no file b.png",
    ),
    "no image": (
        SEES, "x.jsonl", lambda: lines(about(image("a.png")), about(recording("b.wav"))),
        "x.jsonl:2", "b.wav is no image",
    ),
    "half an image": (
        SEES, "x.jsonl", lambda: lines(about(image("a.jpg")), about(image("b.jpg", 700))), "x.jsonl:2", "truncated",
    ),
    "no recording": (
        HEARS, "x.jsonl",
        lambda: lines({"audio": recording("a.wav"), "text": "a"}, {"audio": image("b.png"), "text": "b"}),
        "x.jsonl:2", "b.png is no recording",
    ),
}  # fmt: skip


@hookimpl
def ftcore_load_model() -> None:
    raise AssertionError("weights are read")


def refused(command: tuple[str, ...], file: str, *more: str) -> Refused:
    """What a run says of a file, before it reads any weight."""
    import ftcore

    with pytest.raises(Refused) as found:
        ftcore.run([*command, f"data.path={file}", "trainer.max_steps=1", *more], plugins=[ftcore_load_model])
    return found.value


@pytest.mark.parametrize("kind", CASES)
def test_each_kind_is_found_with_its_place(kind: str, in_tmp: Path) -> None:
    command, file, made, place, reason = CASES[kind]
    Path(file).write_bytes(made() if callable(made) else made)
    found = refused(command, file)
    assert found.code == Exit.DATA
    assert found.problems[0].key == place
    assert reason in found.problems[0].message
    assert found.problems[0].fix


def test_a_prompt_that_fills_the_row_is_dropped_and_counted(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = says({**USER, "content": "x" * 200}, SAYS)
    made = dataset("x.jsonl", lines(GOOD, long, GOOD), "trainer.max_length=100")
    assert len(made["train"]) == 2
    assert "1 of 3 train rows dropped: no trained token within trainer.max_length=100" in capsys.readouterr().out
    Path("x.jsonl").write_bytes(lines(long, long))
    assert "no row of the train split has a trained token" in str(refused(SFT, "x.jsonl", "trainer.max_length=100"))


def test_rows_that_hardly_train_stop_a_run(in_tmp: Path) -> None:
    few = {"input_ids": [1] * 500, "labels": [-100] * 498 + [1, 1]}
    made = lines(few, few)
    Path("x.jsonl").write_bytes(made)
    found = refused(SFT, "x.jsonl")
    assert found.problems[0].message == "only 4 of 998 tokens of the train split are trained"
    assert len(dataset("x.jsonl", made, "data.min_trained=0.002")["train"]) == 2
    Path("x.jsonl").write_bytes(lines({"input_ids": [1, 2, 3], "labels": [-100] * 3}))
    assert "has a trained token" in str(refused(SFT, "x.jsonl")), "all labels are masked"


def dataset(file: str, made: bytes, *more: str) -> Any:
    """The rows as a trainer gets them."""
    Path(file).write_bytes(made)
    hooks, plan = pipeline.prepare(typed(compose([*SFT, f"data.path={file}", *more])))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    raw = hooks.first(h.ftcore_load_dataset, plan=plan)
    return hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)


ASIDE = "data.bad_rows=quarantine"
SHORT = ("trainer.global_batch=1", "trainer.max_steps=1", "trainer.max_length=64", "output_dir=out", "prompts=[]")


def many(*bad: Any, good: int = 300) -> bytes:
    """Bad rows at the front, the middle and the end of good ones."""
    rows: list[Any] = [GOOD] * good
    for number, row in enumerate(bad):
        rows.insert(number * (good // max(len(bad) - 1, 1)), row)
    return lines(*rows)


def test_few_bad_rows_are_put_aside_with_their_reasons(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that cannot be read, one that the format does not take, one that the template does not."""
    from ftcore import run

    bad = ('{"messages": [', says(USER), says(USER, USER, SAYS))
    Path("x.jsonl").write_bytes(many(*bad))
    run([*GEMMA, "data.path=x.jsonl", ASIDE, *SHORT])
    told = [json.loads(line) for line in Path("out/bad_rows.jsonl").read_text().splitlines()]
    assert [one["row"] for one in told] == ["x.jsonl:1", "x.jsonl:151", "x.jsonl:301"]
    assert [one["reason"].split(":")[0] for one in told] == [
        "is not JSON",
        "has no assistant message, so nothing would be trained",
        "the chat template does not take this row",
    ]
    shown = capsys.readouterr().out
    assert "2 of 303 rows put aside, since they are bad; see out/bad_rows.jsonl" in shown
    assert "1 of 303 rows put aside" in shown


def test_more_than_one_in_a_hundred_stops_a_run(in_tmp: Path) -> None:
    Path("x.jsonl").write_bytes(many(*[says(USER)] * 4))
    found = refused(SFT, "x.jsonl", ASIDE)
    assert found.problems[0].message == "4 of 304 rows are bad, and at most 1% may be put aside"
    assert found.problems[1].key == "x.jsonl:1"
    Path("x.jsonl").write_bytes(many(*[says(USER, USER, SAYS)] * 4))
    found = refused(GEMMA, "x.jsonl", ASIDE)
    assert found.problems[0].message == "4 of 304 rows are bad, and at most 1% may be put aside"


def test_tables_and_parquet_are_put_aside_too(in_tmp: Path) -> None:
    table = b"text\n" + b"good\n" * 150 + b"\xff\n" + b"good\n" * 50
    assert len(dataset("x.csv", table, ASIDE)["train"]) == 200
    made = parquet(*[{"text": "a"}] * 150, {"text": None}, *[{"text": "b"}] * 50)
    assert len(dataset("x.parquet", made, ASIDE)["train"]) == 200


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_streams_bad_row_is_found_when_it_is_read(ending: str, in_tmp: Path) -> None:
    """Past the rows that are looked at beforehand."""
    rows = [{"text": "good"}] * 1500 + [{"text": ""}] + [{"text": "good"}] * 99
    made = parquet(*rows) if ending == "parquet" else lines(*rows)
    stream = ("data.streaming=true", "trainer.max_steps=1")
    place = "x.jsonl:1501" if ending == "jsonl" else "x.parquet: row 1501"
    with pytest.raises(Refused, match=f"{place}: column 'text' is empty"):
        list(dataset(f"x.{ending}", made, *stream)["train"])
    for _ in range(2):  # an epoch each
        assert len(list(dataset(f"x.{ending}", made, ASIDE, *stream)["train"])) == 1599
    bad = lines(*rows[:1500], *[{"text": ""}] * 30)
    with pytest.raises(Refused, match=r"at most 1% may be put aside"):
        list(dataset("x.jsonl", bad, ASIDE, *stream)["train"])
