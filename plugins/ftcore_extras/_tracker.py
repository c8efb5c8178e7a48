"""The callback that all trackers share."""

from __future__ import annotations

import math
import queue
import threading
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ftcore.report import note

SETTINGS = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)
"""What a tracker is told of the config: numbers only, so that nothing secret can be among them."""
PATIENCE = 30.0
"""Seconds that the end of a run waits for a tracker."""
WAITING = 10_000
"""Messages that wait for a slow tracker at most; those after them are lost."""


class TrackedRun(Protocol):
    """One run of a tracker."""

    def start(self, settings: dict[str, Any]) -> None:
        """Open the run."""
        ...

    def log(self, values: dict[str, float], step: int) -> None:
        """Send values."""
        ...

    def finish(self) -> None:
        """Close the run."""
        ...


class Tracker(TrainerCallback):
    """Forwards metrics. Any error of the tracker is said once, and the tracker is left alone from then on.

    It is spoken to from a thread of its own, so that a server that is slow or down costs training no time.
    The run is opened by the first log and closed by `close`, not where training begins and ends: held-out rows are
    measured before the first step and after the last, and both are logged.

    :param patience: Seconds that `close` waits.
    """

    def __init__(self, run: TrackedRun, patience: float = PATIENCE) -> None:
        self._run: TrackedRun | None = run
        self._patience = patience
        self._thread: threading.Thread | None = None
        self._said: queue.Queue[tuple[Any, ...]] = queue.Queue(WAITING)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Send the numbers of a log; what is not finite is none."""
        if not state.is_world_process_zero or self._run is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._speak, name="ftcore-tracker", daemon=True)
            self._thread.start()
            self._say("start", {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)})
        numbers = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        self._say("log", {name: value for name, value in numbers.items() if math.isfinite(value)}, state.global_step)

    def close(self) -> None:
        """Close the run, if one was opened; a tracker that does not answer is left."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._say("finish")
            thread.join(self._patience)
            if thread.is_alive():
                note(f"tracker left: no answer within {self._patience:g} s; metrics.jsonl is whole")
        self._run = None

    def _say(self, *message: Any) -> None:
        try:
            self._said.put_nowait(message)
        except queue.Full:  # a tracker that hangs must not take all memory
            return

    def _speak(self) -> None:
        """Tell the tracker everything, in order, until its end or its first error."""
        while True:
            method, *values = self._said.get()
            try:
                getattr(self._run, method)(*values)
            except Exception as error:  # a tracker must never stop training, whatever it raises
                if self._run is not None:  # else it was left already
                    note(f"tracker switched off: {type(error).__name__}: {error}; metrics.jsonl goes on")
                self._run = None
                return
            if method == "finish":
                return


def close(trainer: Any) -> None:
    """Close the trackers of a trainer."""
    for callback in getattr(getattr(trainer, "callback_handler", None), "callbacks", ()):
        if isinstance(callback, Tracker):
            callback.close()
