"""Core's training, evaluation, metrics and progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore import rewards
from ftcore.errors import Exit, Problem, Refused
from ftcore.hooks import hookimpl
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
    from ftcore.preemption import StopWhenTold

    metrics: dict[str, float] = {}
    resume = _resumed(plan)
    if resume is None and trainer.eval_dataset is not None:
        kept = {"eval_loss", *(f"eval_{name}" for name in (plan.trainer.measures if plan.trainer else ()))}
        metrics |= {f"{name}_before": value for name, value in trainer.evaluate().items() if name in kept}
    watch = StopWhenTold()
    trainer.add_callback(watch)
    with watch.listening():
        output = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if watch.told:
        raise watch.left(plan.output_dir, trainer.state.global_step)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if losses:
        metrics |= {"loss_first": losses[0], "loss_last": losses[-1]}
    values = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    if values:
        metrics |= {"reward_first": values[0], "reward_last": values[-1]}
    metrics |= {"train_loss": output.training_loss, "train_seconds": output.metrics.get("train_runtime", 0.0)}
    return TrainReport(steps=trainer.state.global_step, metrics=metrics, history=trainer.state.log_history)


def _resumed(plan: Plan) -> Path | None:
    """The checkpoint to go on from: every byte of it as it was written. Raises Refused when there is none."""
    if plan.run.resume is None:
        return None
    if plan.run.resume != "last":
        return store.checked(Path(plan.run.resume))
    folder = plan.output_dir / "checkpoints"
    newest = store.newest_valid(folder)
    if newest is None:
        fix = "leave resume out, or set output_dir"
        raise Refused(Problem("resume", f"{folder} holds no good checkpoint", fix, Exit.MISSING_INPUT))
    return newest


@hookimpl(trylast=True)
def ftcore_evaluate(trainer: Trainer) -> Mapping[str, float]:
    """`trainer.evaluate()` where there are held-out rows."""
    return trainer.evaluate() if trainer.eval_dataset is not None else {}
