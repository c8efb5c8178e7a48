"""Core's trainer callbacks: the metrics file and the progress line."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftcore.redaction import redact
from ftcore.report import note
from ftcore.rewards import Guarded

SHOWN = ("loss", "reward", "eval_loss")
"""Metrics of the progress line."""


class JsonlMetrics(TrainerCallback):
    """Appends one JSON object per log to a file. A value that is not finite is written as null, never as 0."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write what the trainer logs."""
        if not state.is_world_process_zero or not logs:
            return
        entry = {"step": state.global_step, "time": round(time.time(), 3), **{k: _plain(v) for k, v in logs.items()}}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(redact(json.dumps(entry)) + "\n")


class FailedRewards(TrainerCallback):
    """Adds to each log how many completions so far took a reward's default, and says so at the end."""

    def __init__(self, rewards: Sequence[Guarded]) -> None:
        self._rewards = rewards

    def on_log(
        self, args: Any, state: Any, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Put the counts of the rewards that failed beside the other metrics."""
        if logs is not None:
            logs.update({f"rewards/{r.__name__}/failures": r.failed for r in self._rewards if r.failed})

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Name those that failed."""
        for reward in self._rewards if state.is_world_process_zero else ():
            if reward.failed:
                note(f"reward {reward.__name__} failed on {reward.failed} of {reward.judged} completions")


class Progress(TrainerCallback):
    """A bar on a terminal; elsewhere a plain line about ten times a run."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._start = 0.0
        self._new: dict[str, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start counting."""
        self._start = time.monotonic()
        if state.is_world_process_zero and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            text = TextColumn("{task.description}")
            self._bar = Progress(TextColumn("train"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
            self._bar.start()
            self._task = self._bar.add_task("", total=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show what was logged since the last line; what was measured before the first step stands in the result."""
        if not state.is_world_process_zero or state.global_step == 0:
            return
        self._new |= logs or {}
        text = " ".join(f"{name} {self._new[name]:.4g}" for name in SHOWN if name in self._new)
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, description=text)
        elif "loss" in self._new and _due(state.global_step, state.max_steps):
            pace = (time.monotonic() - self._start) / state.global_step
            print(f"step {state.global_step}/{state.max_steps}  {text}  {pace:.2f} s/step", flush=True)
            self._new.clear()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def _due(step: int, total: int) -> bool:
    every = max(1, total // 10)
    return step == 1 or step == total or step % every == 0


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str, bool, list, dict)) or value is None else float(value)
