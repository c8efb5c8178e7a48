"""Checkpoints are whole or not there, every changed byte is found, and nothing in them is pickled."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ftcore
from ftcore.errors import Refused
from ftcore.testing.faults import cut, files_in, flip, mended
from ftcore.training_checkpoint import manifest, store, tree

TINY = ("+model=llama", "model.tiny=true", "+trainer=sft", "kernels=[]")
STEPS = ("trainer.max_steps=4", "trainer.save_steps=1", "trainer.global_batch=2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of four steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    ftcore.run([*TINY, *STEPS, f"output_dir='{folder}'"])
    return folder


def test_what_a_checkpoint_holds(saved: Path) -> None:
    folder = saved / "checkpoints" / "checkpoint-4"
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {"manifest.json", "optimizer.json", "optimizer.safetensors", "scheduler.json", "random.json"} <= names
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".jinja", ".md"}, "no pickle"
    assert manifest.fault(folder) is None
    assert manifest.about(folder)["step"] == 4
    assert list((saved / "checkpoints").glob(".tmp-*")) == []


def test_every_flipped_bit_is_found(saved: Path, tmp_path: Path) -> None:
    draw, missed = random.Random(0), []
    folder = shutil.copytree(saved / "checkpoints" / "checkpoint-4", tmp_path / "checkpoint-4")
    files = files_in(folder)
    for number in range(256):
        file = files[number % len(files)]  # every file in turn: the large one would get nearly all
        with mended(file):
            place = flip(file, draw)
            reason = manifest.fault(folder)
        if reason is None or (file.name not in reason):
            missed.append((file.name, *place, reason))
    assert missed == []
    assert manifest.fault(folder) is None


def test_every_truncation_is_found(saved: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    folder = shutil.copytree(saved / "checkpoints" / "checkpoint-4", tmp_path / "checkpoint-4")
    files = files_in(folder)
    for number in range(64):
        file = files[number % len(files)]
        with mended(file):
            cut(file, draw)
            assert file.name in str(manifest.fault(folder))
    assert manifest.fault(folder) is None


def test_each_damaged_file_costs_its_checkpoint_and_no_other(saved: Path, tmp_path: Path) -> None:
    """For each file of the newest checkpoint: the one before is taken, and the damaged one kept as it is."""
    draw = random.Random(2)
    newest = saved / "checkpoints" / "checkpoint-4"
    names = [file.relative_to(newest) for file in files_in(newest)]
    for number, name in enumerate(names):
        place = tmp_path / str(number)
        for step in (3, 4):
            shutil.copytree(saved / "checkpoints" / f"checkpoint-{step}", place / f"checkpoint-{step}")
        (flip if number % 2 else cut)(place / "checkpoint-4" / name, draw)
        damaged = (place / "checkpoint-4" / name).read_bytes()
        assert store.newest_valid(place) == place / "checkpoint-3"
        assert (place / "damaged" / "checkpoint-4-1" / name).read_bytes() == damaged


def test_the_newest_good_one_is_taken_and_the_bad_one_kept_aside(saved: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    weights = folder / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (folder / "checkpoint-3" / "manifest.json").unlink()
    (folder / ".tmp-checkpoint-9-1").mkdir()
    assert store.newest_valid(folder) == folder / "checkpoint-2"
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["checkpoint-3-1", "checkpoint-4-1"]
    assert not (folder / ".tmp-checkpoint-9-1").exists()
    said = capsys.readouterr().out
    assert "checkpoint-4 is not used: adapter_model.safetensors has" in said
    assert "checkpoint-3 is not used: it has no manifest.json: it was never finished" in said


def test_a_named_damaged_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "checkpoints" / "checkpoint-2", tmp_path / "checkpoint-2")
    file = folder / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(Refused, match=r"optimizer.safetensors is not as it was written \(SHA-256\)"):
        ftcore.run([*TINY, *STEPS, f"output_dir='{tmp_path / 'run'}'", f"resume='{folder}'"])


def test_old_ones_go_only_once_the_new_one_is_good(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "checkpoints", tmp_path / "checkpoints")
    store.rotate(folder, 2, spared=folder / "checkpoint-1")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    (folder / "checkpoint-4" / "random.json").write_text("{}")
    with pytest.raises(Refused, match="older checkpoints are kept"):
        store.rotate(folder, 1)
    assert (folder / "checkpoint-3").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("words", [("adapter=full",), ("+quantizer=bnb_nf4",), ("trainer.optimizer=adamw_8bit",)])
def test_going_on_is_bit_exact(words: tuple[str, ...], tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    ftcore.run([*TINY, *STEPS, *words, f"output_dir='{whole}'"])
    shutil.copytree(whole / "checkpoints" / "checkpoint-2", broken / "checkpoints" / "checkpoint-2")
    ftcore.run([*TINY, *STEPS, *words, f"output_dir='{broken}'", "resume=last"])
    for file in ("optimizer", "adapter_model" if words != ("adapter=full",) else "model"):
        ours = load_file(broken / "checkpoints" / "checkpoint-4" / f"{file}.safetensors")
        theirs = load_file(whole / "checkpoints" / "checkpoint-4" / f"{file}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    import numpy as np

    state = {
        "a": [1, 2.5, None, True, "x"],
        "pair": (1, (2, torch.arange(3))),
        0: {"step": torch.tensor(4.0), "exp_avg": torch.randn(2, 3).bfloat16()},
        "numpy": np.random.default_rng(0).integers(0, 2**32, 5, dtype=np.uint32),
        "$tensor": "a key that looks like a mark",
    }
    tree.write(tmp_path, "state", state)
    again = tree.read(tmp_path, "state")
    assert again["a"] == state["a"]
    assert again["pair"][0] == 1
    assert isinstance(again["pair"], tuple)
    assert torch.equal(again["pair"][1][1], torch.arange(3))
    assert torch.equal(again[0]["exp_avg"], state[0]["exp_avg"])
    assert (again["numpy"] == state["numpy"]).all()
    assert again["numpy"].dtype == np.uint32
    assert again["$tensor"] == state["$tensor"]
    with pytest.raises(TypeError, match=r"a checkpoint holds no .*Path"):
        tree.write(tmp_path, "other", {"path": tmp_path})


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_no_run_is_lost_to_forty_kills() -> None:
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, script, "40"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 could not go on, 0 ended with other weights" in done.stdout
