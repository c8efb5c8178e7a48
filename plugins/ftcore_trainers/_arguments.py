"""ftcore's trainer keys as the arguments that transformers' and TRL's trainers take."""

from __future__ import annotations

from typing import Any

from ftcore import Plan
from ftcore.memory import micro_batch

OWNED = frozenset(
    {
        "output_dir",
        "learning_rate",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "activation_offloading",
        "bf16",
        "fp16",
        "use_cpu",
        "optim",
        "weight_decay",
        "warmup_steps",
        "lr_scheduler_type",
        "max_grad_norm",
        "seed",
        "data_seed",
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "save_steps",
        "logging_strategy",
        "logging_steps",
        "report_to",
        "disable_tqdm",
        "metric_for_best_model",
        "use_liger_kernel",
        "label_smoothing_factor",
        "max_length",
        "packing",
    }
)
"""Arguments that follow from ftcore's own keys, or that losses leave out, so that `trainer.args` may not set them."""
OWNED_WITH_SMOOTHING = OWNED - {"label_smoothing_factor"}
"""Where the loss is transformers' own, which smooths labels."""
OWNED_BY_ROWS = frozenset(
    {"assistant_only_loss", "completion_only_loss", "dataset_kwargs", "dataset_text_field", "chat_template_path"}
) | {"eos_token"}
"""Of TRL's SFTTrainer: which tokens are trained, and by which template, which ftcore's rows say before it is made."""
OWNED_BY_SFT = OWNED_WITH_SMOOTHING | OWNED_BY_ROWS
OF_TOKENS = ("perplexity", "mean_token_accuracy")
"""What it measures on held-out rows besides the loss."""


def shared(plan: Plan, has_eval: bool) -> dict[str, Any]:
    """Arguments that every trainer of transformers' kind takes."""
    trainer = plan.run.trainer
    assert trainer is not None
    rows = micro_batch(plan)
    return {
        "output_dir": str(plan.output_dir / "checkpoints"),
        "learning_rate": trainer.learning_rate,
        "max_steps": trainer.max_steps,
        "num_train_epochs": trainer.epochs,
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "gradient_accumulation_steps": trainer.global_batch // rows,
        # `memory` alone decides what is recomputed, and the plan what dtype is computed in; TRL would switch both on.
        "gradient_checkpointing": False,
        "bf16": plan.dtype == "bfloat16",
        "fp16": plan.dtype == "float16",
        "use_cpu": plan.device.kind == "cpu",
        # Batches come from pinned memory, so that the host need not wait until the GPU is free to take one.
        "accelerator_config": {"non_blocking": plan.device.kind == "cuda"},
        "optim": trainer.optimizer.value,
        "weight_decay": trainer.weight_decay,
        # A part of few steps rounds down: a run of one step would otherwise be all warm-up, at a rate of 0.
        "warmup_steps": int(trainer.warmup * steps)
        if trainer.warmup < 1 and (steps := trainer.max_steps) > 0
        else trainer.warmup,
        "lr_scheduler_type": trainer.schedule,
        "max_grad_norm": trainer.max_grad_norm,
        "seed": trainer.seed,
        "data_seed": trainer.seed,
        "eval_strategy": "steps" if has_eval and trainer.eval_steps else "no",
        "eval_steps": trainer.eval_steps or None,
        "save_strategy": "steps" if trainer.save_steps else "no",
        "save_steps": trainer.save_steps or 500,
        "metric_for_best_model": _judged_by(plan) if trainer.early_stopping else None,
        "logging_strategy": "steps",
        "logging_steps": trainer.logging_steps,
        "report_to": "none",
        "disable_tqdm": True,  # ftcore shows its own progress
        **trainer.args,
    }


def _judged_by(plan: Plan) -> str:
    """The metric that early stopping goes by: where rewards are learnt, the loss says nothing of them."""
    assert plan.trainer is not None
    return "eval_reward" if "reward" in plan.trainer.measures else "eval_loss"


def quiet(trainer: Any) -> Any:
    """Take transformers' own printing off; ftcore's progress callback says it all."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def early_stopping(plan: Plan) -> list[Any]:
    """The callback for `trainer.early_stopping`, if it is set."""
    from transformers import EarlyStoppingCallback

    assert plan.run.trainer is not None
    patience = plan.run.trainer.early_stopping
    return [EarlyStoppingCallback(early_stopping_patience=patience)] if patience else []
