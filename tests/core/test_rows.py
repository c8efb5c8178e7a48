"""Rows of local files with file and line; which paths are local."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftcore.errors import Exit, Refused
from ftcore.rows import iter_rows, local_files


def write(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_each_kind_of_file(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    files = {
        "x.jsonl": "\n".join(map(json.dumps, rows)) + "\n\n",
        "x.json": json.dumps(rows),
        "x.csv": "text\na\nb\n",
        "x.tsv": "text\na\nb\n",
        "x.txt": "a\nb\n",
    }
    for name, text in files.items():
        assert [dict(row) for _, row in iter_rows(write(tmp_path, name, text))] == rows, name


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "x.parquet")
    assert [(p.rpartition(": ")[2], r) for p, r in iter_rows(tmp_path / "x.parquet")] == [
        ("row 1", {"text": "a"}),
        ("row 2", {"text": "b"}),
    ]


def test_blank_lines_do_not_shift_line_numbers(tmp_path: Path) -> None:
    file = write(tmp_path, "x.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert [place.rpartition(":")[2] for place, _ in iter_rows(file)] == ["1", "3"]


@pytest.mark.parametrize(
    ("name", "text", "place", "reason"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', "x.jsonl:2", "is not JSON"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl:2", "is not UTF-8"),
        ("x.jsonl", "[1, 2]\n", "x.jsonl:1", "is a list, not an object"),
        ("x.json", '{"a": 1}', "x.json", "holds no list of rows"),
        ("x.json", '[{"a": 1},\n}', "x.json:2", "is not JSON"),
        ("x.json", '["a"]', "x.json: row 1", "is a str, not an object"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, name: str, text: str | bytes, place: str, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        list(iter_rows(write(tmp_path, name, text)))
    problem = refused.value.problems[0]
    assert problem.key.endswith(place)
    assert reason in problem.message
    assert refused.value.code == Exit.DATA


def test_what_is_local_and_what_a_hub_id(in_tmp: Path) -> None:
    write(in_tmp, "rows.jsonl", "{}")
    assert local_files("rows.jsonl") == [Path("rows.jsonl")]
    assert local_files("owner/name") is None
    for missing in ("rwos.jsonl", "./nothing", "a/b/c", "C:\\rows\\x.jsonl"):
        with pytest.raises(Refused) as refused:
            local_files(missing)
        assert refused.value.code == Exit.MISSING_INPUT
    with pytest.raises(Refused, match=r"did you mean rows\.jsonl"):
        local_files("rwos.jsonl")


def test_folders(in_tmp: Path) -> None:
    (in_tmp / "data").mkdir()
    with pytest.raises(Refused, match="holds no data files"):
        local_files("data")
    write(in_tmp / "data", "b.jsonl", "{}")
    write(in_tmp / "data", "a.jsonl", "{}")
    write(in_tmp / "data", "notes.md", "")
    assert [f.name for f in local_files("data") or ()] == ["a.jsonl", "b.jsonl"]
    write(in_tmp, "notes.md", "")
    with pytest.raises(Refused, match="unknown ending"):
        local_files("notes.md")
