"""Folders are whole or not there; run folders never collide; the cache follows the platform."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ftcore.paths import cache_dir, claim_run_dir, new_run_dir, whole_folder


def test_a_folder_appears_when_the_block_ends_well(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "a" / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "x").read_text() == "1"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


def test_a_failure_leaves_the_old_folder_and_no_rest(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("old")
    with suppress(RuntimeError), whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("new")
        raise RuntimeError
    assert (tmp_path / "out" / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "out") as folder:
            (folder / "x").write_text(text)
    assert (tmp_path / "out" / "x").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_replaced_folder_with_somebody_elses_files_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]
    assert (tmp_path / "out.old-1" / "mine.txt").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.old-1"]


def test_two_runs_never_share_a_folder(tmp_path: Path) -> None:
    wanted = new_run_dir("m-sft", tmp_path)
    assert [claim_run_dir(wanted).name for _ in range(3)] == ["m-sft-001", "m-sft-002", "m-sft-003"]


def test_run_folders_count_up(tmp_path: Path) -> None:
    assert new_run_dir("m-sft", tmp_path).name == "m-sft-001"
    (tmp_path / "m-sft-009").mkdir()
    (tmp_path / "m-sft-x").mkdir()
    assert new_run_dir("m-sft", tmp_path).name == "m-sft-010"


def test_cache_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/ftcore")
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_dir() == Path("/local/ftcore")
