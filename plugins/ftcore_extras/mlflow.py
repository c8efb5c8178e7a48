"""Metrics to MLflow: a local SQLite file (`mlflow server` shows it), or a tracking server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import ExtraConfig, Plan, hookimpl
from ftcore_extras._closing import ftcore_evaluate as ftcore_evaluate
from ftcore_extras._closing import ftcore_train as ftcore_train

if TYPE_CHECKING:
    from transformers import TrainerCallback

REQUIRES = ("mlflow>=3.7",)


@dataclass
class Config(ExtraConfig):
    """MLflow's settings."""

    uri: str = "sqlite:///mlflow.db"
    """Where runs are kept: a database, by default a file in the working directory as MLflow itself has it, or the
    `http` address of a tracking server."""
    experiment: str = "ftcore"
    """Experiment that the run is listed under; made if it is not there."""


@hookimpl
def ftcore_callbacks(plan: Plan) -> Sequence[TrainerCallback]:
    """One callback; a tracker that fails is switched off, and training goes on."""
    from ftcore_extras._tracker import Tracker

    return [Tracker(_Run(plan.config(Config), plan.output_dir.name))]


class _Run:
    """Speaks to a client of its own: `mlflow.set_tracking_uri` and `mlflow.start_run` hold for the whole process."""

    def __init__(self, config: Config, name: str) -> None:
        self._config, self._name = config, name

    def start(self, settings: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(self._config.uri)
        found = self._client.get_experiment_by_name(self._config.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._config.experiment)
        self._id = self._client.create_run(experiment, run_name=self._name).info.run_id
        self._client.log_batch(self._id, params=[Param(name, str(value)) for name, value in settings.items()])

    def log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def finish(self) -> None:
        self._client.set_terminated(self._id)
