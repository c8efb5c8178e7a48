"""Checkpoints are whole or not there, every changed byte is found, and nothing in them is pickled."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ftcore
from ftcore.errors import Refused
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
    draw = random.Random(0)
    folder = shutil.copytree(saved / "checkpoints" / "checkpoint-4", tmp_path / "checkpoint-4")
    files = [path for path in folder.rglob("*") if path.is_file()]
    missed = []
    for _ in range(256):
        file = draw.choice(files)
        content = bytearray(file.read_bytes())
        place, bit = draw.randrange(len(content)), draw.randrange(8)
        content[place] ^= 1 << bit
        whole = file.read_bytes()
        file.write_bytes(content)
        if manifest.fault(folder) is None:
            missed.append((file.name, place, bit))
        file.write_bytes(whole)
    assert missed == []
    assert manifest.fault(folder) is None


def test_every_truncation_is_found(saved: Path, tmp_path: Path) -> None:
    draw = random.Random(1)
    folder = shutil.copytree(saved / "checkpoints" / "checkpoint-4", tmp_path / "checkpoint-4")
    files = [path for path in folder.rglob("*") if path.is_file()]
    for _ in range(64):
        file = draw.choice(files)
        whole = file.read_bytes()
        file.write_bytes(whole[: draw.randrange(len(whole))])
        assert manifest.fault(folder), file.name
        file.write_bytes(whole)


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


@pytest.mark.parametrize("words", [("adapter=full",), (), ("+quantizer=bnb_nf4",), ("trainer.optimizer=adamw_8bit",)])
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


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ftcore", *TINY, f"output_dir={folder}", "trainer.global_batch=2", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Wait until the run has logged that step."""
    while last_step(folder) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def last_step(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_told_to_stop_it_saves_everything_and_exits_75(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, "trainer.max_steps=200", "trainer.logging_steps=1")
    until_step(process, folder, 3)
    process.send_signal(getattr(signal, name))
    begun = last_step(folder)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 75, rest
    assert f"stopped by {name} after step" in rest
    (checkpoint,) = (folder / "checkpoints").glob("checkpoint-*")
    assert manifest.fault(checkpoint) is None
    last = last_step(folder)
    assert store.step_of(checkpoint) == last
    assert last <= begun + 2, "the step that it was in, and one that ended while the signal was sent"
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"
    again = start(folder, f"trainer.max_steps={last + 1}", "trainer.logging_steps=1")
    text, _ = again.communicate(timeout=120)
    assert again.returncode == 0, text
    assert f"step {last + 1}/{last + 1}" in text


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    process = start(tmp_path / "run", "trainer.max_steps=2000", "trainer.logging_steps=1")
    until_step(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - begun < 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_five_times_it_ends_as_an_unbroken_run(tmp_path: Path) -> None:
    words = ("trainer.max_steps=10", "trainer.save_steps=1", "trainer.logging_steps=1")
    whole = start(tmp_path / "whole", *words)
    assert whole.wait(timeout=300) == 0
    broken, draw = tmp_path / "broken", random.Random(0)
    for number in range(5):
        process = start(broken, *words)
        until_step(process, broken, 2 * number + 2)  # at least one step further than the last time
        time.sleep(draw.random() * 0.3)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    last = start(broken, *words)
    text, _ = last.communicate(timeout=300)
    assert last.returncode == 0, text
    assert "going on with" in text
    for file in ("optimizer", "adapter_model"):
        ours = load_file(broken / "checkpoints" / "checkpoint-10" / f"{file}.safetensors")
        theirs = load_file(tmp_path / "whole" / "checkpoints" / "checkpoint-10" / f"{file}.safetensors")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
def test_no_run_is_lost_to_forty_kills() -> None:
    script = Path(__file__).with_name("kill_runs.py")
    done = subprocess.run([sys.executable, script, "40"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 could not go on" in done.stdout
