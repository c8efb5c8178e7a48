"""Every hook of ftcore, by subject: the page to read first. `pipeline.py` has the order in which a run calls them.

A plugin is a module (or any object) with functions named like these and marked with `hookimpl`. An implementation may
leave out arguments that it does not need. Two kinds of hook:

* **first**: the first answer that is not None is taken. A later plugin is asked before an earlier one, and the order
  is core, selected plugins (in the order of the kinds), `plugins=[...]` of the config, `plugins=` objects given to
  `ftcore.run`. So whatever you add yourself wins, and core, which always comes last, is the default.
* **all**: every answer counts; the lists are joined in the order of selection.

To act before and after a stage, wrap it: `@hookimpl(wrapper=True)` on a function with one `yield`; the value of the
yield is the stage's result, and what the function returns replaces it. Around an **all** hook, both are the joined
list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from ftcore.config import DataConfig, ModelConfig, RunConfig, TrainerConfig
from ftcore.device import Device
from ftcore.errors import Problem
from ftcore.specs import (
    Artifact,
    DataFormat,
    Generator,
    Kernel,
    ModelFamily,
    PatchReport,
    Phase,
    Plan,
    Reward,
    TrainerSpec,
    TrainReport,
)
from ftcore.trained_model import Checkpoint

if TYPE_CHECKING:
    import torch
    from datasets import DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

PROJECT = "ftcore"
PREFIX = "ftcore_"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

first = hookspec(firstresult=True)
all_answers = hookspec

# ---------------------------------------------------------------------------------------------------------------------
# Describe: what was selected. No torch here.
# ---------------------------------------------------------------------------------------------------------------------


@first
def ftcore_model_family(config: ModelConfig) -> ModelFamily | None:
    """Describe the selected model family. Answered by model plugins."""


@first
def ftcore_data_format(config: DataConfig) -> DataFormat | None:
    """Describe how the rows look and what they become. Answered by data plugins."""


@first
def ftcore_trainer_spec(config: TrainerConfig) -> TrainerSpec | None:
    """Describe what the trainer takes. Answered by trainer plugins."""


@all_answers
def ftcore_kernels(family: ModelFamily, device: Device) -> Sequence[Kernel]:
    """Offer kernels for the family's roles. Answered by kernel sets."""


# ---------------------------------------------------------------------------------------------------------------------
# Plan: decide everything, and refuse what cannot work, before any weight is read.
# ---------------------------------------------------------------------------------------------------------------------


@first
def ftcore_make_plan(config: RunConfig, device: Device) -> Plan | None:
    """Turn the config into a plan. Answered by core."""


@all_answers
def ftcore_check_plan(plan: Plan) -> Sequence[Problem]:
    """Name everything that would go wrong. Answered by core and by any plugin that has limits of its own.

    All problems are shown together, and nothing is loaded when there is one.
    """


# ---------------------------------------------------------------------------------------------------------------------
# Load: tokenizer and model, quantized, patched and adapted.
# ---------------------------------------------------------------------------------------------------------------------


@first
def ftcore_load_tokenizer(plan: Plan) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer, with its chat template. Answered by core."""


@first
def ftcore_quantization_config(plan: Plan) -> Any | None:
    """Give transformers' quantization config for loading. Answered by load-time quantizers."""


@first
def ftcore_load_model(plan: Plan, quantization: Any | None) -> PreTrainedModel | None:
    """Load the weights. Answered by core with the family's auto class."""


@first
def ftcore_patch_model(plan: Plan, model: torch.nn.Module, phase: Phase) -> PatchReport | None:
    """Put kernels on module instances. Called for the base model and again once it is adapted. Answered by core."""


@first
def ftcore_quantize_model(plan: Plan, model: PreTrainedModel) -> PreTrainedModel | None:
    """Quantize a loaded model. Answered by quantizers that work after loading; core leaves the model as it is."""


@first
def ftcore_adapt_model(plan: Plan, model: PreTrainedModel) -> torch.nn.Module | None:
    """Put the adapter in, or make all weights trainable. Answered by adapter plugins."""


# ---------------------------------------------------------------------------------------------------------------------
# Data: rows, in the columns that the trainer takes.
# ---------------------------------------------------------------------------------------------------------------------


@first
def ftcore_load_dataset(plan: Plan) -> DatasetDict | None:
    """Read the raw rows into `train` and, where there are held-out rows, `eval`. Answered by core."""


@first
def ftcore_format_dataset(plan: Plan, dataset: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> DatasetDict | None:
    """Convert raw rows to the format's shape, then to tokens if the trainer takes tokens. Answered by core."""


@first
def ftcore_make_collator(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Any | None:
    """Make the data collator. Answered by trainers; None takes the trainer library's own.

    A run is refused before weights are loaded where its `ftcore_make_trainer` takes no `collator`, as most do not.
    """


# ---------------------------------------------------------------------------------------------------------------------
# Train.
# ---------------------------------------------------------------------------------------------------------------------


@all_answers
def ftcore_rewards(plan: Plan) -> Sequence[Reward]:
    """Give reward functions `f(prompts, completions, **columns)`. Answered by rewards, and by core for `rewards`.

    Where `ftcore_make_trainer` takes no `rewards`, nobody asks them, and the run says so.
    """


@all_answers
def ftcore_callbacks(plan: Plan) -> Sequence[TrainerCallback]:
    """Give callbacks for the trainer. Answered by core (metrics.jsonl, progress) and by extras."""


@first
def ftcore_make_generator(plan: Plan, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> Generator | None:
    """Make the generator that writes text: completions to learn from, and answers. Answered by generator plugins."""


@first
def ftcore_make_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer | None:
    """Make the optimizer. None, the default, lets the trainer make the one that `trainer.optimizer` names."""


@first
def ftcore_make_trainer(
    plan: Plan,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetDict,
    collator: Any | None,
    rewards: Sequence[Reward],
    callbacks: Sequence[TrainerCallback],
    generator: Generator | None,
    optimizer: torch.optim.Optimizer | None,
) -> Trainer | None:
    """Make the trainer. Answered by trainer plugins."""


@first
def ftcore_train(plan: Plan, trainer: Trainer) -> TrainReport | None:
    """Train, or resume. Answered by core."""


@first
def ftcore_evaluate(plan: Plan, trainer: Trainer) -> Mapping[str, float] | None:
    """Measure the trained model on the held-out rows. Answered by core."""


# ---------------------------------------------------------------------------------------------------------------------
# Export.
# ---------------------------------------------------------------------------------------------------------------------


@all_answers
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> Sequence[Artifact]:
    """Write the trained model for a consumer. Answered by exporters."""
