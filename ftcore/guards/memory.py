"""A micro-batch that does not fit is computed in parts; the step's gradient is what it would have been.

After an out-of-memory error the gradients of the step so far are thrown away and all its micro-batches are done again,
each in parts of half as many rows: nothing is half applied. A loss that is a sum by a number of the whole step is a sum
of its parts already; one that is a mean over rows is weighted by each part's share of them. The number of rows that fit
is kept for the rest of the run, and in events.jsonl for the run that goes on from it. No pass is counted twice in what
is logged. Dropout draws other masks for parts than it would for the whole; nothing else is other than without the
error, but for the rounding of sums.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from ftcore.device import give_memory_back
from ftcore.errors import Exit, FtcoreError
from ftcore.guards.events import record, recorded, run_folder
from ftcore.guards.measured import noted, put_back
from ftcore.guards.non_finite import SkipsNonFinite
from ftcore.guards.parts import rows_of, sliced, spans
from ftcore.guards.shortage import is_out_of_memory
from ftcore.guards.steps import copied
from ftcore.host_memory import NoHostMemory
from ftcore.memory import layers_that_choose
from ftcore.remedy import remedy
from ftcore.report import note
from ftcore.training_checkpoint.trainer import random_state, set_random_state

RETRIES = 3
EVENT = "out_of_memory"


class NoMemory(FtcoreError):
    """A batch does not fit, however it is cut."""

    code = Exit.CONFIG


class FitsMemory(SkipsNonFinite):
    """A base to put before a trainer of transformers' kind."""

    prepares: bool = False
    """Whether micro-batches are made by `_prepare_inputs` from a state of the trainer's: completions that it drew."""
    _given: Any = None
    """The prepared micro-batch, or part of it, that a pass is to take."""
    _share = 1.0
    """Part of the micro-batch's rows that a pass is of."""
    _rows_at_once: int | None = None
    _done: list[Any]
    _random: Any = None
    _measured: dict[str, Any]

    # What a trainer says of its losses.

    def whole(self, inputs: Any) -> str:
        """Why a micro-batch cannot be computed in parts, or ''."""
        return ""

    def weight(self, share: float) -> float:
        """What the loss of a part is multiplied by, so that those of all parts add up to that of the micro-batch."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            function = getattr(self, "compute_loss_func", None)
            scaled = (self.model_accepts_loss_kwargs and self._step_items is not None) or function is not None
        return 1.0 if scaled else share

    def before_parts(self, parts: list[Any]) -> None:
        """Find what all parts of a micro-batch share."""

    model_accepts_loss_kwargs: bool

    # The training step.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own, with the micro-batch that an earlier part of the run found to fit."""
        found = [e.get("rows_at_once") for e in recorded(run_folder(self.args), EVENT)] if self.guarded else []
        self._rows_at_once = next((rows for rows in reversed(found) if isinstance(rows, int) and rows > 0), None)
        return super().train(*args, **kwargs)

    def _begin_step(self, batches: list[Any], items: Any) -> None:
        super()._begin_step(batches, items)
        self._done = []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As the trainer's own. Raises NoMemory where the micro-batch does not fit in the smallest parts either."""
        if not self.guarded:
            return self._one_pass(model, inputs, num_items_in_batch)
        if self.prepares:
            model.train()  # it is prepared otherwise for an evaluation
            inputs = self._prepare_inputs(inputs)
        if self.prepares or not self._done:  # what was drawn for completions is not drawn again
            self._random = random_state()
        if not self._done:
            self._measured = noted(self)
        self._done.append(inputs)
        return self._seen(self._within_memory(model, num_items_in_batch))

    def _within_memory(self, model: Any, items: Any) -> torch.Tensor:
        """The pass of the newest micro-batch; after an error that of all of the step, in smaller parts."""
        first = len(self._done) - 1
        for retry in range(RETRIES + 1):
            error, of_host = "", False
            try:
                for number in range(first, len(self._done)):
                    loss = self._in_parts(model, number, items)
                return loss
            except RuntimeError as raised:
                if not is_out_of_memory(raised):
                    raise
                error, of_host = str(raised).splitlines()[0], isinstance(raised, NoHostMemory)
            # Past the `except`: its traceback held the activations.
            self._make_room(retry, error, of_host)
            first = 0
        raise AssertionError("unreachable")

    def _make_room(self, retry: int, error: str, of_host: bool) -> None:
        """Halve the rows of a pass, and go back to the beginning of the step. Raises NoMemory if that is no use."""
        newest = self._done[-1]
        rows = min(self._rows_in(len(self._done) - 1), self._rows_at_once or 1 << 60)
        why = self.whole(newest)
        if self.accelerator.num_processes > 1:
            why = "several processes compute it together"
        elif not why and not self.prepares and not self._are_known(len(self._done) - 1):
            why = "its rows come from a stream"
        if why:
            raise self._none(f"out of memory: {error}\n    the micro-batch cannot be cut, for {why}", of_host)
        if rows <= 1:
            raise self._none(f"out of memory with one row at a time: {error}", of_host)
        if retry >= RETRIES:
            raise self._none(f"out of memory with {rows} rows at a time, the {retry + 1}th time: {error}", of_host)
        self._drop_gradients()
        for layer in layers_that_choose(self.model):
            layer.forget()  # launches that were recorded hold the memory of a batch that never comes again
        give_memory_back()
        set_random_state(self._random)
        if not self.prepares or len(self._done) == 1:  # else with what was measured of other completions since
            put_back(self, self._measured)
        self._rows_at_once = (rows + 1) // 2
        step = self.state.global_step + 1
        record(run_folder(self.args), EVENT, step=step, rows=rows, rows_at_once=self._rows_at_once, error=error)
        note(
            f"step {step}: out of memory with {rows} rows at a time; going on with {self._rows_at_once}: the same "
            f"batch and loss, computed in more parts (trainer.micro_batch={self._spares()} spares the attempt)"
        )

    def _spares(self) -> int:
        """The largest micro-batch of rows that fit which cuts a step into whole ones."""
        assert self._rows_at_once is not None
        whole = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return next(rows for rows in range(self._rows_at_once, 0, -1) if whole % rows == 0)

    def _none(self, said: str, of_host: bool) -> NoMemory:
        """The error, with what to set instead."""
        optimizer: Any = self.optimizer  # none before training
        if optimizer is not None:
            self._drop_gradients()
        gc.collect()
        stepped = optimizer is not None and bool(optimizer.state)
        return NoMemory(f"{said}\n    fix: {remedy(self.model, stepped, of_host)}")

    def _rows_in(self, number: int) -> int:
        """Rows of a micro-batch of this step."""
        if not self.prepares and self._are_known(number):
            assert self._step_rows is not None
            return len(self._step_rows[number])
        return rows_of(self._done[number])

    def _are_known(self, number: int) -> bool:
        """Whether the rows of a micro-batch of this step are: not of one that somebody puts in by hand."""
        return self._step_rows is not None and number < len(self._step_rows)

    def _in_parts(self, model: Any, number: int, items: Any) -> torch.Tensor:
        """Forward and backward of a micro-batch, in as many parts as it takes; returns its loss."""
        inputs, rows = self._done[number], self._rows_in(number)
        if self._rows_at_once is None or rows <= self._rows_at_once or self.whole(inputs):
            return self._pass(model, inputs, 1.0, items)
        cuts = spans(rows, self._rows_at_once)
        parts = [self._part(number, start, end) for start, end in cuts]
        self.before_parts(parts)
        shares = [(end - start) / rows for start, end in cuts]
        losses = [self._pass(model, part, share, items) for part, share in zip(parts, shares, strict=True)]
        return torch.stack(losses).sum()

    def _part(self, number: int, start: int, end: int) -> Any:
        """Some rows of a micro-batch: collated anew, or cut out of what was prepared."""
        if self.prepares:
            return sliced(self._done[number], start, end)
        assert self._drawn_rows is not None
        assert self._step_rows is not None
        return self._drawn_rows.batch(self._step_rows[number][start:end])

    def _pass(self, model: Any, inputs: Any, share: float, items: Any) -> torch.Tensor:
        """Forward and backward of a part, with the weight of its share."""
        weight = 1.0 if share == 1.0 else self.weight(share)
        steps = self.accelerator.gradient_accumulation_steps  # what `backward` divides a loss by
        self._share, self._given = share, inputs if self.prepares else None
        self.accelerator.gradient_accumulation_steps = steps / weight if weight != 1 else steps
        try:
            loss = self._one_pass(model, copied(inputs), items)
            return loss if weight == 1 else loss * weight
        finally:
            self.accelerator.gradient_accumulation_steps = steps
            self._share, self._given = 1.0, None

    def _prepare_inputs(self, inputs: Any) -> Any:
        """What a pass was given is prepared already."""
        return super()._prepare_inputs(inputs) if self._given is None else copied(self._given)  # type: ignore[misc]

    # Evaluation.

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's own; after an out-of-memory error once more from its beginning, with half the rows."""
        random = random_state()
        for retry in range(RETRIES + 1):
            error, of_host = "", False
            try:
                return super().evaluate(*args, **kwargs)  # type: ignore[misc]
            except RuntimeError as raised:
                rows = self.args.per_device_eval_batch_size
                if not self.guarded or not is_out_of_memory(raised):
                    raise
                error, of_host = str(raised).splitlines()[0], isinstance(raised, NoHostMemory)
            if rows <= 1 or retry >= RETRIES or self.prepares or self.accelerator.num_processes > 1:
                raise self._none(f"out of memory while evaluating, {rows} rows at a time: {error}", of_host)
            self.args.per_device_eval_batch_size = (rows + 1) // 2
            self.forget_evaluation()
            give_memory_back()
            set_random_state(random)
            note(f"out of memory while evaluating, {rows} rows at a time; once more with {(rows + 1) // 2}")
        raise AssertionError("unreachable")

    def forget_evaluation(self) -> None:
        """Forget the metrics of an evaluation that was broken off."""
        metrics = getattr(self, "_metrics", None)
        if isinstance(metrics, dict) and isinstance(metrics.get("eval"), dict):
            metrics["eval"].clear()
        vars(self).pop("_eval_dataloaders", None)
