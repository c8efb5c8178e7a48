"""Core's optimizer, where parameters have rates of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftcore.hooks import hookimpl
from ftcore.parameter_groups import has_rates, parameter_groups
from ftcore.specs import Plan

if TYPE_CHECKING:
    import torch

ARGUMENTS = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
"""What `trainer.args` may say of the optimizer."""


@hookimpl(trylast=True)
def ftcore_make_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """The optimizer that `trainer.optimizer` names, over groups of several rates; None where there is but one rate."""
    trainer = plan.run.trainer
    if trainer is None or not has_rates(trainer):
        return None
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(plan.output_dir / "checkpoints"),
        optim=trainer.optimizer.value,
        learning_rate=trainer.learning_rate,
        use_cpu=plan.device.kind == "cpu",
        **{name: value for name, value in trainer.args.items() if name in ARGUMENTS},
    )
    made, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: torch.optim.Optimizer = made(parameter_groups(trainer, model), **options)
    if options.get("optim_bits") == 8:
        _embeddings_in_32_bits(model)
    return optimizer


def _embeddings_in_32_bits(model: Any) -> None:
    """As transformers does it: bitsandbytes' moments of an embedding stay whole, since its rows are seldom seen."""
    import torch
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    managers: Any = GlobalOptimManager
    manager = managers.get_instance()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
