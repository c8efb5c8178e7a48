"""What is measured of a trainer: its steps, its memory above the weights, and what its first step was."""

from __future__ import annotations

import gc
from typing import Any

from curvebench.training import checksum
from stepbench.loop import GIB
from stepbench.profiling import profiled
from stepbench.trainers import StepMeter, first_loss

from rlbench.works import TrainerWork


class TrainingMeter(StepMeter):
    """A :class:`StepMeter` that also looks at the model before the first step."""

    def __init__(self, work: TrainerWork) -> None:
        super().__init__(work)
        self._work = work
        self._base = 0
        self._start: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Model and adapter are loaded, and no state of the optimizer is there yet."""
        import torch

        trained = [p for p in model.parameters() if p.requires_grad]
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
        self._start = {
            "trained": sum(p.numel() for p in trained),
            "adapter_at_start": checksum(trained),
            "weights_gib": sum(tensors.values()) / GIB,
        }
        gc.collect()
        self._base = torch.cuda.memory_allocated() if self._work.device == "cuda" else 0
        super().on_train_begin(args, state, control, **kwargs)

    def result(self, trainer: Any) -> dict[str, Any]:
        """What a side reports; with `profile`, the kernels of one more pass forward and backward too."""
        found = {**self.meter.result(first_loss(trainer)), **self._start, "base_gib": self._base / GIB}
        first = next(entry for entry in trainer.state.log_history if "grad_norm" in entry)
        gpu = self._work.device == "cuda"
        found |= {
            "first_gradient": float(first["grad_norm"]),
            "above_gib": found["peak_gib"] - found["base_gib"] if gpu else 0.0,
        }
        if self._work.profile:
            found["profile"] = profiled(self._work, lambda: once_more(trainer), found["step_ms"])
        return found


def once_more(trainer: Any) -> None:
    """A step without the optimizer's part."""
    trainer.model.train()
    trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())), None)
