"""Time of a step inside a trainer of transformers' kind."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from stepbench.loop import Meter
from stepbench.works import Work, token_ids


class StepMeter(TrainerCallback):
    """Times from the end of one step to the end of the next, so that loading and logging count as well."""

    def __init__(self, work: Work) -> None:
        self.meter = Meter(work)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.stop()
        self.meter.start()


def first_loss(trainer: Any) -> float:
    """The loss that the trainer logged for its first step."""
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


def dataset(work: Work, labels: bool) -> Any:
    """Rows of exactly `length` tokens in the order of the bare loop's batches; every token is trained."""
    from datasets import Dataset

    if work.images:
        raise SystemExit("rows with images are measured in bare loops only: --sides hf,ftcore")
    ids = token_ids(work).flatten(0, 1).tolist()
    return Dataset.from_dict({"input_ids": ids, **({"labels": ids} if labels else {})})
