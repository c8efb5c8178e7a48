"""A disk that is too small is named before the first step, and one that fills up costs no checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ftcore
from ftcore import disk
from ftcore.cli import run as command
from ftcore.errors import Exit, Refused
from ftcore.hooks import hookimpl
from ftcore.testing.faults import counted, file_limit, fill, full_at, tiny_disk
from ftcore.training_checkpoint import manifest, space, store, tree

WORDS = ("+model=llama", "model.tiny=true", "+trainer=sft", "kernels=[]", "trainer.global_batch=2", "prompts=[]")
STEPS = ("trainer.max_steps=4", "trainer.save_steps=1")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")


class AtStep:
    """A plugin that calls a function after a step, before the checkpoint of that step is written."""

    def __init__(self, step: int, call: Any) -> None:
        self._step, self._call = step, call

    @hookimpl
    def ftcore_callbacks(self) -> list[Any]:
        from transformers import TrainerCallback

        step, call = self._step, self._call

        class Calls(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == step:
                    call()

        return [Calls()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_a_disk_that_is_too_small_is_named_before_the_first_step(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(disk, "SPARE", 0)
    asked: list[int] = []
    real = shutil.disk_usage

    def small(path: Any) -> Any:
        asked.append(1)
        return real(path)._replace(free=3 * 2**20)

    monkeypatch.setattr(disk.shutil, "disk_usage", small)
    words = [*WORDS, "trainer.max_steps=400", "trainer.save_steps=1", f"output_dir={tmp_path / 'run'}"]
    assert command([*words, "+export=[safetensors]"]) == 74
    said = capsys.readouterr()
    assert "output_dir: this run, with 401 checkpoints of " in said.err
    assert "MiB free" in said.err
    assert "keep fewer with trainer.args.save_total_limit=1" in said.err
    assert "step 1/" not in said.out
    words = [*WORDS, "trainer.max_steps=3", "trainer.save_steps=1", f"output_dir={tmp_path / 'other'}"]
    assert command([*words, "trainer.args.save_total_limit=2"]) == 0
    assert asked


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({"save_steps": 1}, 10),
        ({"save_steps": 1, "save_total_limit": 2}, 2),
        ({"save_steps": 0.25}, 4),
        ({"save_steps": 4}, 3),  # the last step is saved as well
        ({"save_strategy": "no"}, 1),
        ({"max_steps": -1, "num_train_epochs": 2, "save_steps": 4}, 4),
    ],
)
def test_how_many_checkpoints_are_kept(given: dict[str, Any], count: int) -> None:
    usual = {"save_strategy": "steps", "save_total_limit": None, "max_steps": 10, "world_size": 1}
    usual |= {"train_batch_size": 8, "gradient_accumulation_steps": 2}
    trainer = SimpleNamespace(args=SimpleNamespace(**(usual | given)), train_dataset=range(128))
    assert space.kept(trainer) == count


@pytest.mark.parametrize("words", [(), pytest.param(("adapter=full",), marks=pytest.mark.slow)])
def test_the_estimate_is_near_what_is_written(words: tuple[str, ...], tmp_path: Path) -> None:
    guessed: list[int] = []

    class Looks:
        @hookimpl(wrapper=True)
        def ftcore_train(self, trainer: Any) -> Any:
            guessed.append(space.checkpoint_bytes(trainer))
            return (yield)

    run = [*WORDS, *words, "trainer.max_steps=1", "trainer.save_steps=1", f"output_dir='{tmp_path / 'run'}'"]
    ftcore.run(run, plugins=[Looks()])
    files = (tmp_path / "run" / "checkpoints" / "checkpoint-1").glob("*.safetensors")
    weights = sum(file.stat().st_size for file in files)
    assert 0.9 * weights < guessed[0] <= weights  # a file has a header


@POSIX
def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(tmp_path: Path, capsys) -> None:
    """On a disk of its own where this process may mount one."""
    place = tmp_path / "disk"
    try:
        with tiny_disk(place, 80 * 2**20):
            words, run = [*WORDS, "trainer.max_steps=3", "trainer.save_steps=1"], place / "run"
            with pytest.raises(Refused) as caught:
                ftcore.run([*words, f"output_dir='{run}'"], plugins=[AtStep(2, lambda: fill(place, 64 * 1024))])
            assert caught.value.code == Exit.IO
            said = f"{run / 'checkpoints' / 'checkpoint-2'} cannot be written: No space left on device; the last good"
            assert f"output_dir: {said} checkpoint is checkpoint-1\n" in str(caught.value)
            assert checkpoints(run) == ["checkpoint-1"]
            assert manifest.fault(run / "checkpoints" / "checkpoint-1") is None
            (place / "filler").unlink()
            assert command([*words, f"output_dir={run}"]) == 0
            assert f"going on with {run} after step 1" in capsys.readouterr().out
    except PermissionError as error:
        pytest.skip(str(error))


@POSIX
def test_old_checkpoints_make_room_for_a_new_one(tmp_path: Path, capsys) -> None:
    place = tmp_path / "disk"
    try:
        with tiny_disk(place, 80 * 2**20):
            run = place / "run"
            emptied = AtStep(4, (place / "filler").unlink)
            filled = AtStep(3, lambda: fill(place, 64 * 1024))
            ftcore.run([*WORDS, *STEPS, f"output_dir='{run}'"], plugins=[filled, emptied])
            said = "checkpoint-3 was not written (No space left on device): checkpoint-1 deleted to try again"
            assert said in capsys.readouterr().out
            assert checkpoints(run) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
            assert [manifest.fault(run / "checkpoints" / name) for name in checkpoints(run)] == [None] * 3
    except PermissionError as error:
        pytest.skip(str(error))


@POSIX
def test_on_a_disk_of_3_mb_it_is_refused_at_once(tmp_path: Path, capsys) -> None:
    try:
        with tiny_disk(tmp_path / "disk", 3 * 2**20) as place:
            assert command([*WORDS, *STEPS, f"output_dir={place / 'run'}"]) == 74
            assert "3.0 MiB free" in capsys.readouterr().err
    except PermissionError as error:
        pytest.skip(str(error))


@POSIX
def test_a_limit_on_the_size_of_files_is_named_and_nothing_is_deleted_for_it(tmp_path: Path, monkeypatch) -> None:
    run, limits = tmp_path / "run", []

    def limited() -> None:
        limits.append(file_limit(20_000))
        limits[-1].__enter__()

    try:
        with pytest.raises(Refused, match=r"checkpoint-3 cannot be written: File too large; the last good .*-2"):
            ftcore.run([*WORDS, *STEPS, f"output_dir='{run}'"], plugins=[AtStep(3, limited)])
    finally:
        limits[-1].__exit__(None, None, None)
    assert checkpoints(run) == ["checkpoint-1", "checkpoint-2"]
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert command([*WORDS, *STEPS, f"output_dir={run}"]) == 0


def write(target: Path, step: int) -> None:
    """A checkpoint of a few small files."""
    with manifest.sealed(target, {"step": step}) as work:
        tree.write(work, "optimizer", {"exp_avg": torch.full((4,), float(step))})
        tree.write(work, "random", {"state": [step]})


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_at_every_single_change_the_last_good_one_is_whole(code: int, tmp_path: Path) -> None:
    """At each of the changes that saving makes to the disk the state is the old or the new one, and never a mixture."""
    with counted(tmp_path) as events:
        write(tmp_path / "try" / "checkpoint-1", 1)
    assert len(events) >= 6
    for number in range(len(events) + 1):
        place = tmp_path / f"at-{number}"
        write(place / "checkpoint-1", 1)
        write(place / "checkpoint-2", 2)
        failed = None
        try:
            with full_at(place, number, code):
                space.saved(place / "checkpoint-3", lambda p=place: write(p / "checkpoint-3", 3), None)
        except Refused as refused:
            failed = refused
        assert not list(place.glob(".tmp-*"))
        newest = store.newest_valid(place)
        assert newest is not None
        assert (newest.name == "checkpoint-2") is (failed is not None)
        assert tree.read(newest, "random") == {"state": [store.step_of(newest)]}
        assert failed is None or failed.code == Exit.IO


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x"), os.strerror(errno.ENOSPC)),
        (OSError(errno.EDQUOT, "x"), os.strerror(errno.EDQUOT)),
        (RuntimeError("I/O error: No space left on device (os error 28)"), os.strerror(errno.ENOSPC)),
        (OSError(errno.EACCES, "x"), None),
        (ValueError("28"), None),
    ],
)
def test_which_errors_are_for_want_of_room(error: Exception, said: str | None) -> None:
    assert disk.shortage(error) == said
    wrapped = RuntimeError("in between")
    wrapped.__cause__ = error
    assert disk.shortage(wrapped) == said
