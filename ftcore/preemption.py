"""A run that is told to stop saves its whole state after the step that it is in, and exits 75.

Schedulers tell it by SIGTERM (Kubernetes, `kill`) or SIGUSR1 (Slurm's `--signal=USR1@60`), a person by Ctrl-C. A
second signal ends the process at once.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from ftcore import signals
from ftcore.errors import Exit, FtcoreError
from ftcore.report import note


class Preempted(FtcoreError):
    """The run was told to stop, and can go on."""

    code = Exit.PREEMPTED


class StopWhenTold(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint."""

    def __init__(self) -> None:
        self.told: str | None = None
        """Name of the signal that came."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have transformers save and stop."""
        if self.told:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals for as long as the block runs; outside the main thread, where Python has none, do not."""

        def caught(number: int, frame: FrameType | None) -> None:
            self.told = signal.Signals(number).name
            note(f"{self.told}: stopping after this step; once more stops at once")
            for one in signals.numbers():
                signal.signal(one, signal.default_int_handler)

        # Once told, the process is about to end: a signal until then is a Ctrl-C, not a kill.
        with signals.handled(caught, keep=lambda: self.told is not None):
            yield

    def left(self, run: Path, step: int) -> Preempted:
        """What is raised once the state is saved."""
        return Preempted(f"stopped by {self.told} after step {step}\n    fix: the same command goes on in {run}")
