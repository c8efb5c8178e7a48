"""Metrics to Weights & Biases: its servers with an account, or local files that `wandb sync` sends later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from ftcore import ExtraConfig, Plan, hookimpl
from ftcore_extras._closing import ftcore_evaluate as ftcore_evaluate
from ftcore_extras._closing import ftcore_train as ftcore_train

if TYPE_CHECKING:
    from transformers import TrainerCallback

REQUIRES = ("wandb>=0.20",)


class Mode(Enum):
    """Where metrics go."""

    online = "online"
    offline = "offline"


@dataclass
class Config(ExtraConfig):
    """Weights & Biases' settings."""

    project: str = "ftcore"
    """Project that the run is listed under."""
    entity: str | None = None
    """Team or user that the project belongs to; empty takes the account's own."""
    mode: Mode = Mode.online
    """`online` sends while training and needs `wandb login`; `offline` needs neither account nor network, and writes
    into `wandb/` of the run folder."""


@hookimpl
def ftcore_callbacks(plan: Plan) -> Sequence[TrainerCallback]:
    """One callback; a tracker that fails is switched off, and training goes on."""
    from ftcore_extras._tracker import Tracker

    return [Tracker(_Run(plan))]


class _Run:
    def __init__(self, plan: Plan) -> None:
        self._config, self._folder = plan.config(Config), plan.output_dir

    def start(self, settings: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=self._config.project,
            entity=self._config.entity,
            name=self._folder.name,
            dir=str(self._folder.absolute()),  # wandb's process keeps the working directory that it began in
            mode=self._config.mode.value,
            config=settings,
            reinit="finish_previous",  # of a run of the same sweep that failed
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def finish(self) -> None:
        self._run.finish()
