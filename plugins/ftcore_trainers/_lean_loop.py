"""transformers' training loop without its walks over every module and its waits for the device in every step.

A model has thousands of modules, and the loop walks over all of them five times a step: to switch on training mode,
to count parameters for a statistic, to find gradients to clip, twice to clear them. On a small model that takes longer
than the step itself. Each walk is replaced by what it comes to; where it might come to something else, it stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import DistributedType

from ftcore.guards.memory import FitsMemory

WHOLE = (DistributedType.NO, DistributedType.MULTI_GPU)
"""Where every process has whole gradients."""


class LeanLoop(FitsMemory):
    """A base to put before a trainer of transformers' kind; with it come ftcore's checkpoints and guards."""

    model: Any
    optimizer: Any
    accelerator: Any
    args: Any
    _weights: int = -1

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own."""
        with _lean(self):
            return super().train(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; a part of few steps rounds down: one step would be all warm-up, at a rate of 0."""
        if 0 < self.args.warmup_steps < 1:
            self.args.warmup_steps = int(self.args.warmup_steps * num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)  # type: ignore[misc]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' own statistic, with the parameters counted once."""
        main = getattr(self.model, "main_input_name", "input_ids")
        if main not in inputs or not hasattr(self.model, "num_parameters"):
            return 0
        if self._weights < 0:
            self._weights = self.model.num_parameters(exclude_embeddings=True)
        return int(6 * inputs[main].numel() * self._weights)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.accelerator.distributed_type not in WHOLE:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        self.accelerator.unscale_gradients()
        parameters = [p for p in optimized(self.optimizer) if p.grad is not None]
        return torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.accelerator.distributed_type in WHOLE:  # nothing is clipped
            self.accelerator.unscale_gradients()
            grad_norm = torch.nn.utils.get_total_norm([p.grad for p in optimized(self.optimizer) if p.grad is not None])
        return super()._get_grad_norm(model, grad_norm)


def optimized(optimizer: Any) -> Iterator[torch.nn.Parameter]:
    """The parameters that an optimizer steps, as its groups are now."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


@contextmanager
def _lean(trainer: Any) -> Iterator[None]:
    """For as long as the trainer trains, its model is put into training mode and cleared without a walk."""
    model = trainer.model

    def train(mode: bool = True) -> Any:
        return model if mode and model.training else type(model).train(model, mode)

    def zero_grad(set_to_none: bool = True) -> None:
        if trainer.optimizer is None or not set_to_none:
            type(model).zero_grad(model, set_to_none)
            return
        for parameter in optimized(trainer.optimizer):
            parameter.grad = None

    # The model says that it trains as soon as it is wrapped in an adapter, while the base under it does not yet.
    model.train()
    given = {"train": train, "zero_grad": zero_grad}
    if any(name in vars(model) for name in given):  # somebody else's are there
        yield
        return
    vars(model).update(given)
    try:
        yield
    finally:
        for name in given:
            vars(model).pop(name, None)
