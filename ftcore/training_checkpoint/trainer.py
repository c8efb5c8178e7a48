"""transformers' trainers with ftcore's checkpoints: put before a trainer class, as a base of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from ftcore.errors import Exit, Problem, Refused
from ftcore.memory import STATE_READ
from ftcore.training_checkpoint import progress, tree
from ftcore.training_checkpoint.manifest import sealed
from ftcore.training_checkpoint.space import saved
from ftcore.training_checkpoint.store import rotate

STATE = "trainer_state.json"
"""transformers' own file, which it reads back itself: step, epoch, history."""
HOW = ("fused", "foreach")
"""How a group is stepped: the optimizer's own matter, not the checkpoint's. A GradScaler breaks a half fused one."""


class SafeCheckpoints:
    """Saves and loads model, optimizer, scheduler, scaler, random generators and position, without pickle."""

    args: Any
    model: Any
    state: Any
    control: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    processing_class: Any
    callback_handler: Any
    kept: tuple[str, ...] = progress.KEPT
    """Names of the attributes that go on with the run; a trainer adds those of its own."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """All or nothing; older checkpoints go once the new one was read back."""
        self.store_flos()  # type: ignore[attr-defined]
        place = Path(self.args.output_dir)
        target = place / f"checkpoint-{self.state.global_step}"
        if not self.args.should_save:
            return
        if (best := self.state.best_global_step) and (place / f"checkpoint-{best}").is_dir():
            self.state.best_model_checkpoint = str(place / f"checkpoint-{best}")
        best_so_far = Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None
        saved(target, lambda: self._write(target), best_so_far)
        rotate(place, self.args.save_total_limit, best_so_far)

    def _write(self, target: Path) -> None:
        with sealed(target, {"step": self.state.global_step}) as work:
            self._save(str(work))
            tree.write(work, "optimizer", self.optimizer.state_dict())
            tree.write(work, "scheduler", self.lr_scheduler.state_dict())
            if (scaler := getattr(self.accelerator, "scaler", None)) is not None:
                tree.write(work, "scaler", scaler.state_dict())
            tree.write(work, "random", random_state())
            progress.write(work, self, self.kept_now())
            self._note_callbacks()
            self.state.save_to_json(str(work / STATE))

    def kept_now(self) -> tuple[str, ...]:
        """Those of `kept` that the next step needs; all of them, unless a trainer knows better."""
        return self.kept

    def _note_callbacks(self) -> None:
        """transformers' callbacks that have a state of their own, such as early stopping."""
        from transformers.trainer_callback import ExportableState

        for one in [*self.callback_handler.callbacks, self.control]:
            if isinstance(one, ExportableState):
                self.state.stateful_callbacks[type(one).__name__] = one.state()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Model and tokenizer; transformers would add its arguments as a pickle, tokens for the hub included.

        A model without an adapter has the names that it is trained with, not those that families are published with:
        transformers reads a checkpoint back by them, and goes on from the base where they are others.
        """
        folder, model = output_dir or self.args.output_dir, self.accelerator.unwrap_model(self.model)
        own_names = {} if hasattr(model, "peft_config") else {"save_original_format": False}
        model.save_pretrained(folder, state_dict=state_dict, **own_names)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """transformers warns of weights that a checkpoint does not have. Raises Refused: they would be the base's."""
        state = self.model.state_dict()
        missing = {name for name in load_result.missing_keys if name in state}
        read = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        lost = sorted(name for name in missing - ignored if state[name].data_ptr() not in read)
        if lost:
            message = f"the checkpoint does not have {len(lost)} of the model's weights, such as {lost[0]}"
            fix = "begin anew with resume=never; if an older ftcore wrote the checkpoint, it named them otherwise"
            raise Refused(Problem("resume", message, fix, Exit.DATA))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state = tree.read(Path(checkpoint), "optimizer")
            for group, made in zip(state["param_groups"], self.optimizer.param_groups, strict=False):
                group |= {name: made[name] for name in HOW if name in made}
            peaks = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(state)
            setattr(self.model, STATE_READ, True)
            self.lr_scheduler.load_state_dict(tree.read(Path(checkpoint), "scheduler"))
            self._set_rates(peaks)

    def _set_rates(self, peaks: list[Any]) -> None:
        """Rates of the step that comes, by this run's peaks and schedule, which may be longer than the checkpoint's."""
        from torch.optim.lr_scheduler import LambdaLR

        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        if not isinstance(scheduler, LambdaLR):
            return
        scheduler.base_lrs = peaks
        scheduler._last_lr = [
            peak * at(scheduler.last_epoch) for peak, at in zip(peaks, scheduler.lr_lambdas, strict=True)
        ]
        for group, peak, rate in zip(self.optimizer.param_groups, peaks, scheduler._last_lr, strict=True):
            group["initial_lr"], group["lr"] = peak, rate

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is not None and scaler is not None:
            scaler.load_state_dict(tree.read(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            progress.read(Path(checkpoint), self, self.kept)
            set_random_state(tree.read(Path(checkpoint), "random"))

    def _init_training_state(
        self, max_steps: int, per_pass: int, passes: Any, resume_from_checkpoint: str | None, trial: Any = None
    ) -> tuple[int, int]:
        """Passes over the data that are done, and batches of the one that is not."""
        place: tuple[int, int] = super()._init_training_state(  # type: ignore[misc]
            max_steps, per_pass, passes, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return place
        return progress.place_in_stream(Path(resume_from_checkpoint), self) or place


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, NumPy, PyTorch and its GPUs."""
    import numpy as np
    import torch

    state: dict[str, Any] = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set the generators; those of GPUs that this machine does not have are left out."""
    import numpy as np
    import torch

    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    for number, one in enumerate(state.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(one, number)
