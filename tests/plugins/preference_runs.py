"""Trainers as a run makes them, which do not train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ftcore
from ftcore.specs import TrainReport

TINY = ("model.tiny=true", "model.dtype=float32", "trainer.max_length=200")


class Held:
    """A plugin that keeps what a run made: its trainer, and the rows that the trainer was given."""

    trainer: Any
    rows: list[dict[str, Any]]

    @ftcore.hookimpl(wrapper=True)
    def ftcore_make_trainer(self, dataset: Any):
        self.rows = list(dataset["train"])
        self.trainer = yield
        return self.trainer

    @ftcore.hookimpl
    def ftcore_train(self) -> TrainReport:
        return TrainReport(steps=0, metrics={}, history=[])

    @ftcore.hookimpl
    def ftcore_evaluate(self) -> dict[str, float]:
        return {"eval_loss": 0.0}


def held(folder: Path, trainer: str, *words: str, model: str = "qwen3", found: Held | None = None) -> Held:
    """The trainer of a run on the shipped rows."""
    found = found or Held()
    kernels = () if any(word.startswith("kernels=") for word in words) else ("kernels=[reference]",)
    words = (f"+model={model}", *TINY, *kernels, f"+trainer={trainer}", f"output_dir='{folder}'", *words)
    ftcore.run(list(words), plugins=[found])
    return found


def rows_of(trainer: Any, *places: int) -> dict[str, Any]:
    """A batch of the rows in these places, or of all."""
    rows = [trainer.train_dataset[place] for place in places or range(len(trainer.train_dataset))]
    columns = trainer._signature_columns or []
    trainer._set_signature_columns_if_needed()
    if trainer.args.remove_unused_columns:
        columns = trainer._signature_columns
        rows = [{name: value for name, value in row.items() if name in columns} for row in rows]
    return dict(trainer._prepare_inputs(trainer.data_collator(rows)))


def move(model: Any) -> dict[str, torch.Tensor]:
    """Move what is trained by noise, the same for every model with these names; returns it."""
    drawn, moved = torch.Generator().manual_seed(3), {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=drawn) * 0.05).to(parameter.device))
                moved[name] = parameter.detach().clone()
    return moved


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
