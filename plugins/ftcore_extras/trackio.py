"""Metrics to trackio: a local dashboard (`trackio show`), no account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import ExtraConfig, Plan, hookimpl
from ftcore_extras._closing import ftcore_evaluate as ftcore_evaluate
from ftcore_extras._closing import ftcore_train as ftcore_train

if TYPE_CHECKING:
    from transformers import TrainerCallback

REQUIRES = ("trackio>=0.4",)


@dataclass
class Config(ExtraConfig):
    """trackio's settings."""

    project: str = "ftcore"
    """Project that the run is listed under."""


@hookimpl
def ftcore_callbacks(plan: Plan) -> Sequence[TrainerCallback]:
    """One callback; a tracker that fails is switched off, and training goes on."""
    from ftcore_extras._tracker import Tracker

    return [Tracker(_Run(plan.config(Config).project, plan.output_dir.name))]


class _Run:
    def __init__(self, project: str, name: str) -> None:
        self._project, self._name = project, name

    def start(self, settings: dict[str, Any]) -> None:
        import trackio

        trackio.init(project=self._project, name=self._name, config=settings, embed=False)

    def log(self, values: dict[str, float], step: int) -> None:
        import trackio

        trackio.log(values, step=step)

    def finish(self) -> None:
        import trackio

        trackio.finish()
