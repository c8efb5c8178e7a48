"""Supervised fine-tuning that is pulled back to where it began (L2-SP, Li et al. 2018, arXiv 1802.01483)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, TrainerSpec, hookimpl
from ftcore_trainers import sft

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class Config(sft.Config):
    """SFT's settings, and one more."""

    pull: float = 0.1
    """Factor of half the squared distance from the weights before training, which is added to the loss."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes what SFT takes."""
    return sft.ftcore_trainer_spec()


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """What SFT checks, and a pull that pulls."""
    pull = plan.config(Config).pull
    own = [Problem("trainer.pull", f"is {pull}", "give a number from 0")] if pull < 0 else []
    return [*sft.ftcore_check_plan(plan), *own]


@hookimpl
def ftcore_make_collator(plan: Plan, tokenizer: Any) -> Any | None:
    """SFT's."""
    return sft.ftcore_make_collator(plan, tokenizer)


@hookimpl
def ftcore_make_trainer(
    plan: Plan, model: Any, tokenizer: Any, dataset: Any, collator: Any, callbacks: Any, optimizer: Any
) -> Trainer:
    """SFT's trainer; the gradient of the distance is added before each optimizer step."""
    from transformers import TrainerCallback

    pull = plan.config(Config).pull
    start = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}

    class Pull(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for parameter, was in start.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - was, alpha=pull)

    trainer = sft.ftcore_make_trainer(plan, model, tokenizer, dataset, collator, callbacks, optimizer)
    trainer.add_callback(Pull())
    return trainer
