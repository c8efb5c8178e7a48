"""A step that does not end is said, with every thread's stack; the run goes on."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import TrainerCallback

import ftcore
from ftcore.guards import watchdog
from ftcore.guards.watchdog import LEAST, Watchdog


def test_a_run_that_hangs_says_where_and_goes_on(in_tmp: Path, monkeypatch, capsys) -> None:
    class Slow(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                somewhere_in_the_data()

    def somewhere_in_the_data() -> None:
        ends = time.monotonic() + 20
        while not list(Path("run").glob("hang-2.txt")) and time.monotonic() < ends:
            time.sleep(0.05)
        time.sleep(0.3)

    @ftcore.hookimpl
    def ftcore_callbacks() -> Any:
        return [Slow()]

    monkeypatch.setattr(watchdog.Watchdog.__init__, "__defaults__", (0.4,))
    words = ["+model=llama", "model.tiny=true", "model.dtype=float32", "kernels=[]", "+trainer=sft", "prompts=[]"]
    words += ["trainer.max_steps=4", "trainer.global_batch=2", "trainer.max_length=160", "output_dir=run"]
    ftcore.run(words, plugins=[ftcore_callbacks])
    assert "ftcore-watchdog" not in [thread.name for thread in threading.enumerate()]
    stacks = Path("run/hang-2.txt").read_text()
    assert "in somewhere_in_the_data" in stacks
    assert stacks.count("hread 0x") >= 2
    (event,) = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    assert (event["event"], event["step"], event["file"]) == ("hang", 2, "hang-2.txt")
    out = capsys.readouterr().out
    assert out.count("after step 2; where every thread is: run/hang-2.txt; waiting on.") == 1
    assert "watchdog: step 3 came to an end after all" in out
    assert json.loads(Path("run/run.json").read_text())["steps"] == 4


def test_how_long_is_too_long(tmp_path: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    dog = Watchdog(tmp_path)
    assert dog.limit() == LEAST == 60
    for seconds in (500, 1, 1, 1, 20, 20, 20, 20):  # the first one compiles, and is not counted
        now[0] += seconds
        dog.on_step_end(None, SimpleNamespace(global_step=1), None)
    assert dog.limit() == 10 * 20
