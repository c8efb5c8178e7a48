"""A run that is told to stop saves its whole state, says so by its exit status, and goes on as if nothing had been."""

from __future__ import annotations

import gc
import json
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ftcore import signals
from ftcore.testing.faults import Child, last_step
from ftcore.training_checkpoint import manifest, store

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
WORDS = ("+model=llama", "model.tiny=true", "+trainer=sft", "kernels=[]", "trainer.global_batch=2", "prompts=[]")


def start(folder: Path, *words: str) -> Child:
    """A run in a process that is forked from this one, with everything imported."""
    import torch
    import trl.trainer.sft_trainer  # noqa: F401

    import ftcore.pipeline  # noqa: F401

    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    return Child([*WORDS, "trainer.logging_steps=1", *words], folder, warm=True)


def weights(folder: Path) -> bytes:
    return (folder / "trained" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", SIGNALS)
def test_told_to_stop_it_saves_everything_and_exits_75(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    child = start(folder, "trainer.max_steps=200")
    child.until_step(3)
    begun = last_step(folder)
    child.send(name)
    assert child.wait() == 75, child.said()
    assert f"stopped by {name} after step" in child.said()
    (checkpoint,) = (folder / "checkpoints").glob("checkpoint-*")
    assert manifest.fault(checkpoint) is None
    last = last_step(folder)
    assert store.step_of(checkpoint) == last
    assert last <= begun + 2, "the step that it was in, and one that ended while the signal was sent"
    assert json.loads((folder / "run.json").read_text())["status"] == "stopped"


@pytest.mark.parametrize("name", SIGNALS)
def test_a_second_signal_ends_it_at_once(name: str, tmp_path: Path) -> None:
    child = start(tmp_path / "run", "trainer.max_steps=2000")
    child.until_step(1)
    child.send(name)
    time.sleep(0.02)
    child.send("SIGTERM")
    begun = time.monotonic()
    assert child.wait() == 75
    assert time.monotonic() - begun < 2


def test_told_before_and_after_training_it_exits_75_as_well(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    before = start(folder, "trainer.max_steps=2", "trainer.save_steps=1")
    before.until((folder / ".lock").is_file)
    before.send("SIGTERM")
    assert before.wait() == 75, before.said()
    after = start(folder, "trainer.max_steps=2", "trainer.save_steps=1", "+export=[gguf,safetensors]")
    after.until((folder / "trained").is_dir)
    after.send("SIGTERM")
    assert after.wait() == 75, after.said()
    again = start(folder, "trainer.max_steps=2", "trainer.save_steps=1", "+export=[gguf,safetensors]")
    assert again.wait() == 0, again.said()
    assert (folder / "export" / "safetensors" / "model.safetensors").is_file()


class Told:
    """Its finalizer runs while the signal comes."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0)  # Python calls the handler here


def told_while_collecting() -> None:
    def callback(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            gc.callbacks.remove(callback)
            Told.__del__(Told.__new__(Told))

    gc.callbacks.append(callback)
    gc.collect()


def wait_after(come: Callable[[], object]) -> None:
    with signals.interrupting():
        come()
        time.sleep(60)
    pytest.fail("the signal is lost")


@pytest.mark.parametrize("come", [Told, told_while_collecting])
def test_a_signal_that_comes_inside_a_finalizer_is_not_lost(come: Callable[[], object]) -> None:
    before = {number: signal.getsignal(number) for number in signals.numbers()}
    hook = sys.unraisablehook
    try:
        with pytest.raises(KeyboardInterrupt):
            wait_after(come)
        time.sleep(0.05)  # it comes once
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sys.unraisablehook is hook


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_at_random_moments_it_ends_as_an_unbroken_run(tmp_path: Path) -> None:
    words = ("trainer.max_steps=60", "trainer.save_steps=1000")
    assert start(tmp_path / "whole", *words).wait() == 0
    folder, draw = tmp_path / "broken", random.Random(0)
    for number in range(6):
        child, ahead = start(folder, *words), draw.randrange(8)
        if ahead:
            child.until_step(last_step(folder) + ahead)
        else:
            child.until((folder / ".lock").is_file)
        time.sleep(draw.random() * 0.05)
        step = last_step(folder)
        child.send(SIGNALS[number % 3])
        assert child.wait() == 75, child.said()
        assert last_step(folder) <= step + 2
    last = start(folder, *words)
    assert last.wait() == 0, last.said()
    assert weights(folder) == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_five_times_it_ends_as_an_unbroken_run(tmp_path: Path) -> None:
    words = ("trainer.max_steps=10", "trainer.save_steps=1")
    assert start(tmp_path / "whole", *words).wait() == 0
    folder, draw = tmp_path / "broken", random.Random(0)
    for number in range(5):
        child = start(folder, *words)
        child.until_step(2 * number + 2)  # at least one step further than the last time
        assert child.kill_within(0.1, draw) is None, child.said()
    last = start(folder, *words)
    assert last.wait() == 0, last.said()
    assert "going on with" in last.said()
    assert weights(folder) == weights(tmp_path / "whole")
    files = [f / "checkpoints" / "checkpoint-10" / "optimizer.safetensors" for f in (folder, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_every_signal_is_one_that_the_system_has() -> None:
    assert all(hasattr(signal, name) for name in SIGNALS)
