"""Says where a run hangs: every thread's stack goes to the run folder when no step ends for long, and the run goes on.

Long is ten times the median of the steps so far, and a minute at least. A batch of an evaluation counts as a step does;
until the first step, in which kernels may be compiled, nothing is expected.
"""

from __future__ import annotations

import faulthandler
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from ftcore.guards.events import record
from ftcore.report import note

TIMES = 10
LEAST = 60.0
"""Seconds."""
STEPS = 100
"""Steps that the median is taken of."""


class Watchdog(TrainerCallback):
    """Watches the steps of a trainer from a thread of its own.

    :param folder: Run folder; stacks go to `hang-STEP.txt` in it.
    :param least: Seconds without a step that are never too long.
    """

    def __init__(self, folder: Path, least: float = LEAST) -> None:
        self._folder, self._least = folder, least
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._last: float | None = None
        self._step = 0
        self._said = False
        self._over = threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for as long as the block runs."""
        thread = threading.Thread(target=self._watch, name="ftcore-watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def limit(self) -> float:
        """Seconds without a step that are too long."""
        return max(self._least, TIMES * statistics.median(self._steps)) if self._steps else self._least

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Note how long the step took."""
        now = time.monotonic()
        if self._last is not None:
            self._steps.append(now - self._last)
        self._alive(now, state.global_step)

    def on_prediction_step(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """An evaluation goes on."""
        self._progress(state)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """And ends."""
        self._progress(state)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint is written."""
        self._progress(state)

    def _progress(self, state: TrainerState) -> None:
        if self._last is not None:
            self._alive(time.monotonic(), state.global_step)

    def _alive(self, now: float, step: int) -> None:
        if self._said:
            note(f"watchdog: step {step} came to an end after all")
        self._last, self._step, self._said = now, step, False

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._least / 4)):
            last = self._last
            if last is not None and not self._said and time.monotonic() - last > self.limit():
                self._said = True
                self._dump(time.monotonic() - last)

    def _dump(self, waited: float) -> None:
        """Write the stacks; once until the next step."""
        file = self._folder / f"hang-{self._step}.txt"
        try:
            with file.open("w", encoding="utf-8") as opened:
                faulthandler.dump_traceback(opened, all_threads=True)
        except OSError as error:
            note(f"watchdog: no step for {waited:.0f} s, and {file} cannot be written ({error.strerror})")
            return
        record(self._folder, "hang", step=self._step, seconds=round(waited, 1), file=file.name)
        note(
            f"watchdog: no step for {waited:.0f} s after step {self._step}; where every thread is: {file}; "
            "waiting on. Ctrl-C or SIGTERM saves after the step, twice ends at once"
        )
