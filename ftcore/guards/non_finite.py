"""A step whose loss or gradient is not finite changes nothing, is named, and stops the run if it is not the only one.

The learning rate follows the number of steps, skipped ones among them: the schedule of a run does not depend on what
was skipped, on any device. Where a GradScaler is at work (float16), gradients that overflow are its business, and the
schedule waits for it as transformers has it; only a loss that is not finite counts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ftcore.guards.events import record, run_folder
from ftcore.guards.finite import NonFinite, first_non_finite, refuse_non_finite
from ftcore.guards.shortage import is_out_of_memory
from ftcore.guards.skipping import OnDevice, OnHost, Step, forget_step, give_flag, reads_flag
from ftcore.guards.steps import WatchedSteps, copied
from ftcore.guards.sums import SUMS, finite_sums
from ftcore.guards.tally import Tally
from ftcore.report import note
from ftcore.training_checkpoint.trainer import random_state, set_random_state

SHOWN = 16
"""Rows named in a message; all of them are in events.jsonl."""


class _Pending(NamedTuple):
    """A step that was launched, and what is needed to judge it."""

    number: int
    values: Step
    rows: list[list[int]] | None
    batches: list[Any]
    items: Any
    on_device: bool


class SkipsNonFinite(WatchedSteps):
    """A base to put before a trainer of transformers' kind."""

    repeatable: Any = True
    """Whether a micro-batch can be computed once more: not where it draws completions of its own."""

    _tally: Tally
    _pending: _Pending | None = None
    _loss_of_step: torch.Tensor | None = None
    _lost = 0
    """Steps whose loss was logged as not finite."""
    _before_log: tuple[Any, float, int] = (None, 0.0, -1)
    """The loop's sums: of the losses since the last log, of all before, and the step of that log."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own. Raises NonFinite where too many steps, or the weights in the end, are not finite."""
        # The loop would ask the device after every batch whether the loss is finite, and hide it if it is not.
        self.args.logging_nan_inf_filter = False
        self._tally, self._pending, self._loss_of_step, self._lost = Tally(), None, None, 0
        self._before_log = (None, 0.0, -1)
        output = super().train(*args, **kwargs)  # type: ignore[misc]
        self._settle()
        if self.guarded:
            refuse_non_finite("what was trained", self.model, self.optimizer)
        if self._tally.skipped:
            output.metrics["skipped_steps"] = self._tally.skipped
        return output

    def _begin_step(self, batches: list[Any], items: Any) -> None:
        super()._begin_step(batches, items)
        self._loss_of_step = None

    def _seen(self, loss: torch.Tensor) -> torch.Tensor:
        """Add the loss of a micro-batch to that of its step."""
        if self.guarded:
            self._loss_of_step = loss if self._loss_of_step is None else self._loss_of_step + loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm; before it is returned, the optimizer is kept from a step that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        if self.guarded and torch.is_tensor(norm) and self._loss_of_step is not None:
            self._settle()
            self._judge(self._loss_of_step, norm)
        return norm

    def _judge(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Decide over the step that the optimizer is about to make."""
        if self.accelerator.num_processes > 1:  # every process decides alike; the norm is that of all of them
            loss = self.accelerator.reduce(loss.clone(), "sum")
        if self._scaler() is not None:
            norm = torch.zeros_like(loss)
        on_device = reads_flag(self.optimizer, loss.device) and self._scaler() is None
        values: Step = OnDevice(loss, norm) if on_device else OnHost(loss, norm)
        rows, number = self._step_rows, self.state.global_step + 1
        self._pending = _Pending(number, values, rows, self._step_batches, self._step_items, on_device)
        if isinstance(values, OnDevice):
            give_flag(self.optimizer, values)
        else:
            self._settle()

    def _scaler(self) -> Any:
        return getattr(self.accelerator, "scaler", None)

    def _settle(self) -> None:
        """Judge the step that was launched last, if that was not done yet. Raises NonFinite if it is one too many."""
        step, self._pending = self._pending, None
        if step is None:
            return
        bad = [name for name, value in zip(("loss", "gradient"), step.values.values(), strict=True)
               if not math.isfinite(value)]  # fmt: skip
        reason = self._tally.add(bool(bad))
        if not bad:
            return
        if step.on_device:
            forget_step(self.optimizer)
        else:
            self._drop_gradients()
        self._tell(step, bad)
        if reason:
            raise NonFinite(self._last_words(step.number, reason))

    def _drop_gradients(self) -> None:
        """An optimizer changes nothing of a parameter without a gradient, weight decay and step count included."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _tell(self, step: _Pending, bad: list[str]) -> None:
        """Say and record which step, which rows, and whether it happens again."""
        again = self._again(step)
        loss, norm = (value if math.isfinite(value) else None for value in step.values.values())
        facts = {"step": step.number, "not_finite": bad, "loss": loss, "grad_norm": norm, "rows": step.rows}
        record(run_folder(self.args), "non_finite", **facts, again=again)
        which = _named(step.rows)
        note(f"step {step.number}: {' and '.join(bad)} not finite ({which}; {again}); nothing was changed by it")

    def _again(self, step: _Pending) -> str:
        """Compute the step's gradients once more: `reproducible`, `transient`, or `not tried`."""
        if not self.repeatable or self._scaler() is not None or self.accelerator.num_processes > 1:
            return "not tried again"
        try:
            with self._as_if_nothing_happened(step):
                losses = [self._one_pass(self.model_wrapped, copied(one), step.items) for one in step.batches]
                gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
                norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
                finite = bool(torch.stack([norm.float(), *(loss.float() for loss in losses)]).isfinite().all())
        except RuntimeError as error:  # beside the gradients of the step after it
            if not is_out_of_memory(error):
                raise
            return "not tried again: no memory"
        return "transient: finite when computed again" if finite else "reproducible: the same when computed again"

    @contextmanager
    def _as_if_nothing_happened(self, step: _Pending) -> Iterator[None]:
        """The count of steps is that of `step`; it, gradients, generators and metrics are afterwards as they were."""
        # Copies: recorded launches leave every step's gradients in the same memory.
        held = [
            (p, None if p.grad is None else p.grad.clone())
            for group in self.optimizer.param_groups
            for p in group["params"]
        ]
        metrics = {name: copy.deepcopy(vars(self)[name]) for name in SUMS if name in vars(self)}
        random, now = random_state(), self.state.global_step
        self._drop_gradients()
        self.state.global_step = step.number - 1  # on a device the next step may have been launched meanwhile
        try:
            yield
        finally:
            self.state.global_step = now
            set_random_state(random)
            vars(self).update(metrics)
            for parameter, gradient in held:
                parameter.grad = gradient

    def _last_words(self, step: int, reason: str) -> str:
        lost = first_non_finite(self.model, self.optimizer)
        why = f"; {lost} is not finite itself" if lost else ""
        place = run_folder(self.args) / "events.jsonl"
        return (
            f"training stopped at step {step}: {reason}{why}\n"
            f"    fix: look at the rows that {place} names, lower trainer.learning_rate, or use model.dtype=float32"
        )

    # -------------------------------------------------------------------------------- what is logged and kept

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """As the trainer's own. The loop's sum of losses would stay NaN for good: NaN less NaN is NaN."""
        self._before_log = (tr_loss, self._total_loss_scalar, self._globalstep_last_logged)
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._settle()  # these wait for the device anyway
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's own; a checkpoint that follows has sums without what is not finite."""
        tr_loss, total, logged = self._before_log
        if logged >= 0 and self._globalstep_last_logged != logged and not math.isfinite(self._total_loss_scalar):
            tr_loss.zero_()
            self._total_loss_scalar = total
            self._lost += self._globalstep_last_logged - logged
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The mean loss of the run is that of the steps whose loss was logged as a number."""
        # transformers 5.17 has no such number, and takes the mean over all steps of the run.
        steps = self.state.global_step - getattr(self, "_initial_global_step", 0)
        if self._lost:
            self._total_loss_scalar *= steps / (steps - self._lost) if steps > self._lost else math.nan
        return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]

    _total_loss_scalar: float
    _globalstep_last_logged: int

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the trainer's own. Raises NonFinite instead of keeping what is not finite."""
        if self.guarded:
            self._settle()
            refuse_non_finite(f"the checkpoint of step {self.state.global_step}", self.model, self.optimizer)
        with finite_sums(self):
            super()._save_checkpoint(model, trial)


def _named(rows: list[list[int]] | None) -> str:
    if rows is None:
        return "rows of a stream, which have no number"
    flat = [row for part in rows for row in part]
    more = f" and {len(flat) - SHOWN} more" if len(flat) > SHOWN else ""
    return f"rows {', '.join(map(str, flat[:SHOWN]))}{more} of the training rows, from 0"
