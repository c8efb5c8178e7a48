"""The callback that all trackers share."""

from __future__ import annotations

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

    The run is opened by the first log and closed by `close`, not where training begins and ends: held-out rows are
    measured before the first step and after the last, and both are logged.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._run: TrackedRun | None = run
        self._open = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Send the numbers of a log."""
        if not state.is_world_process_zero:
            return
        if not self._open:
            self._open = True
            self._try("start", {name: getattr(args, name) for name in SETTINGS if hasattr(args, name)})
        values = {name: float(value) for name, value in (logs or {}).items() if isinstance(value, (int, float))}
        self._try("log", values, state.global_step)

    def close(self) -> None:
        """Close the run, if one was opened."""
        if self._open:
            self._try("finish")
        self._run = None

    def _try(self, method: str, *values: Any) -> None:
        if self._run is None:
            return
        try:
            getattr(self._run, method)(*values)
        except Exception as error:  # a tracker must never stop training, whatever it raises
            note(f"tracker switched off: {type(error).__name__}: {error}; metrics.jsonl goes on")
            self._run = None


def close(trainer: Any) -> None:
    """Close the trackers of a trainer."""
    for callback in getattr(getattr(trainer, "callback_handler", None), "callbacks", ()):
        if isinstance(callback, Tracker):
            callback.close()
