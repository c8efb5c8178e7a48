"""Core's training, evaluation, metrics and progress."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import rewards
from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
from ftcore.resuming import NEVER
from ftcore.specs import Plan, Reward, TrainReport
from ftcore.training_checkpoint import store

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback


@hookimpl(trylast=True)
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """The user's own functions: `rewards=[file.py:function]`."""
    return rewards.own(plan)


@hookimpl(trylast=True)
def ftcore_callbacks(plan: Plan) -> Sequence[TrainerCallback]:
    """metrics.jsonl and the progress line are always on."""
    from ftcore.callbacks import JsonlMetrics, Progress

    return [JsonlMetrics(plan.output_dir / "metrics.jsonl"), Progress()]


@hookimpl(trylast=True)
def ftcore_train(plan: Plan, trainer: Trainer) -> TrainReport:
    """`trainer.train()`, from a checkpoint where `resume` names one; held-out rows are measured first."""
    from ftcore.guards.finite import refuse_non_finite
    from ftcore.guards.watchdog import Watchdog
    from ftcore.preemption import StopWhenTold
    from ftcore.training_checkpoint.space import need_room
    from ftcore.training_checkpoint.trainer import SafeCheckpoints

    metrics: dict[str, float] = {}
    resume = _resumed(plan)
    if isinstance(trainer, SafeCheckpoints):
        need_room(plan, trainer)
    if resume is None and trainer.eval_dataset is not None:
        kept = {"eval_loss", *(f"eval_{name}" for name in (plan.trainer.measures if plan.trainer else ()))}
        metrics |= {f"{name}_before": value for name, value in trainer.evaluate().items() if name in kept}
    if resume is not None:
        _forget_after(plan.output_dir / "metrics.jsonl", store.step_of(resume))
    if resume is not None and 0 < trainer.args.max_steps <= store.step_of(resume):
        _load_last(trainer, resume)  # stopped after its last step, before it measured and exported
    else:
        watch, watchdog = StopWhenTold(), Watchdog(plan.output_dir)
        trainer.add_callback(watch)
        trainer.add_callback(watchdog)
        with watch.listening(), watchdog.watching():
            output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        if watch.told:
            raise watch.left(plan.output_dir, trainer.state.global_step)
        if not trainer.state.global_step:
            message = "the rows do not fill one batch, so that no step was made"
            raise Refused(Problem("trainer.global_batch", message, "give more rows, or make it smaller", Exit.DATA))
        refuse_non_finite("what was trained", trainer.model)  # also of a trainer without ftcore's guards
        metrics |= {"train_loss": output.training_loss, "train_seconds": output.metrics.get("train_runtime", 0.0)}
        if skipped := output.metrics.get("skipped_steps"):
            metrics["skipped_steps"] = skipped
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses:
        metrics |= {"loss_first": losses[0], "loss_last": losses[-1]}
    values = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    if values:
        metrics |= {"reward_first": values[0], "reward_last": values[-1]}
    return TrainReport(steps=trainer.state.global_step, metrics=metrics, history=trainer.state.log_history)


def _load_last(trainer: Any, checkpoint: Path) -> None:
    """The model as it was after its last step."""
    from transformers import TrainerState

    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


def _forget_after(file: Path, step: int) -> None:
    """Take out of the metrics what was logged after the checkpoint: those steps are done again."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line)
        except ValueError:  # the last line of a killed run
            continue
    whole = file.with_suffix(".tmp")
    whole.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    whole.replace(file)


def _resumed(plan: Plan) -> Path | None:
    """The checkpoint to go on from: every byte of it as it was written. Raises Refused when there is none."""
    asked = plan.run.resume.checkpoint
    if asked in (None, NEVER):
        return None
    if asked != "last":
        return store.checked(Path(asked))
    folder = plan.output_dir / "checkpoints"
    newest = store.newest_valid(folder)
    if newest is None:
        fix = "leave resume out: the same command then begins anew, and keeps what is damaged; or set output_dir"
        raise Refused(Problem("resume", f"{folder} holds no good checkpoint", fix, Exit.MISSING_INPUT))
    return newest


@hookimpl(trylast=True)
def ftcore_evaluate(trainer: Trainer) -> Mapping[str, float]:
    """`trainer.evaluate()` where there are held-out rows."""
    return trainer.evaluate() if trainer.eval_dataset is not None else {}
