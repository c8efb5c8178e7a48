"""What is outside of a run, trackers and the hub, cannot stop or delay it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerCallback

import ftcore
from ftcore_extras import _tracker
from ftcore_extras._closing import ftcore_evaluate, ftcore_train
from ftcore_extras._tracker import Tracker

WORDS = ["+model=llama", "model.tiny=true", "model.dtype=float32", "kernels=[]", "prompts=[]", "+trainer=sft"]
WORDS += ["trainer.max_steps=3", "trainer.global_batch=2", "trainer.max_length=160", "output_dir=run"]


class Server:
    """A tracker that hears, hangs or fails."""

    def __init__(self, hangs: bool = False) -> None:
        self.heard: list[Any] = []
        self.hangs = hangs
        self.up = threading.Event()

    def start(self, settings: dict[str, Any]) -> None:
        if self.hangs:
            self.up.wait(60)
            raise TimeoutError("down")

    def log(self, values: dict[str, float], step: int) -> None:
        self.heard.append((step, values))

    def finish(self) -> None:
        self.heard.append("finish")


def tracked(server: Server, *more: Any, patience: float = 30.0) -> None:
    @ftcore.hookimpl
    def ftcore_callbacks() -> Any:
        return [Tracker(server, patience)]

    plugin = SimpleNamespace(
        ftcore_callbacks=ftcore_callbacks, ftcore_evaluate=ftcore_evaluate, ftcore_train=ftcore_train
    )
    ftcore.run(WORDS, plugins=[plugin, *more])


def test_a_server_that_hangs_costs_no_time(in_tmp: Path, capsys) -> None:
    server = Server(hangs=True)
    start = time.monotonic()
    tracked(server, patience=0.2)
    assert time.monotonic() - start < 50
    assert server.heard == []
    out = capsys.readouterr().out
    assert out.count("tracker left: no answer within 0.2 s; metrics.jsonl is whole") == 1
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"
    server.up.set()
    (thread,) = [t for t in threading.enumerate() if t.name == "ftcore-tracker"]
    thread.join(10)
    assert not thread.is_alive()
    assert "switched off" not in capsys.readouterr().out


def test_a_run_that_fails_tells_its_tracker_all(in_tmp: Path) -> None:
    class Fails(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                raise ValueError("boom")

    @ftcore.hookimpl
    def ftcore_callbacks() -> Any:
        return [Fails()]

    server = Server()
    with pytest.raises(ValueError, match="boom"):
        tracked(server, ftcore_callbacks)
    assert [entry[0] for entry in server.heard if "loss" in entry[1]] == [1, 2]
    assert server.heard[-1] == "finish"


def test_a_number_that_is_none_is_not_sent() -> None:
    server = Server()
    tracker = Tracker(server)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1)
    tracker.on_log(SimpleNamespace(), state, None, {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    tracker.close()
    tracker.on_log(SimpleNamespace(), state, None, {"loss": 1.0})
    assert server.heard == [(1, {"lr": 0.5}), "finish"]


def test_a_server_that_hangs_takes_no_memory(monkeypatch) -> None:
    monkeypatch.setattr(_tracker, "WAITING", 5)
    server = Server(hangs=True)
    tracker = Tracker(server, patience=0.05)
    for step in range(100):
        tracker.on_log(SimpleNamespace(), SimpleNamespace(is_world_process_zero=True, global_step=step), None, {"a": 1})
    assert tracker._said.qsize() <= 5
    tracker.close()
    server.up.set()


@pytest.mark.slow
def test_a_hub_that_is_down(in_tmp: Path) -> None:
    """A server that refuses every connection: training, its checkpoints and the adapter need none."""
    words = [*WORDS, "trainer.save_steps=1"]
    down = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "ftcore", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=down, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("run/trained/adapter_model.safetensors").is_file()
    assert len(list(Path("run/checkpoints").iterdir())) >= 1
