"""Metrics to TensorBoard: event files in the run folder (`tensorboard --logdir runs`), no account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import ExtraConfig, Plan, hookimpl
from ftcore_extras._closing import ftcore_evaluate as ftcore_evaluate
from ftcore_extras._closing import ftcore_train as ftcore_train

if TYPE_CHECKING:
    from transformers import TrainerCallback

REQUIRES = ("tensorboard>=2.18",)


@dataclass
class Config(ExtraConfig):
    """TensorBoard has no settings: the event files are in `tensorboard/` of the run folder."""


@hookimpl
def ftcore_callbacks(plan: Plan) -> Sequence[TrainerCallback]:
    """One callback; a tracker that fails is switched off, and training goes on."""
    from ftcore_extras._tracker import Tracker

    return [Tracker(_Run(plan.output_dir / "tensorboard"))]


class _Run:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder))
        self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in settings.items()), 0)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # what is shown is up to date, and nothing is lost with a run that fails

    def finish(self) -> None:
        self._writer.close()
