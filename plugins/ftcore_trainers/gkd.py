"""GKD by TRL: distillation from a teacher, on rows and on the student's own completions (arXiv 2306.13649)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused, Shape, TrainerConfig, TrainerSpec, checkpoint, hookimpl
from ftcore.errors import Exit
from ftcore_trainers._arguments import OWNED, OWNED_BY_ROWS
from ftcore_trainers._preference import in_range
from ftcore_trainers._rollout_keys import problems, without_dropout

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass
class Config(TrainerConfig):
    """GKD's settings."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    teacher: str | None = None
    """Checkpoint folder or hub id of the teacher, which has the student's vocabulary; null gives a tiny model a tiny
    random one, and is refused for others."""
    lmbda: float = 0.5
    """Part of the micro-batches that are the student's own completions; 0 takes the rows alone."""
    beta: float = 0.5
    """Of the generalised Jensen-Shannon divergence: 0 is KL(teacher || student), 1 is KL(student || teacher)."""
    max_completion_length: int = 64
    """Longest completion in tokens."""
    temperature: float = 0.9
    """Sampling temperature of the student's completions."""


@hookimpl
def ftcore_trainer_spec() -> TrainerSpec:
    """Takes token ids and labels, which ftcore makes."""
    own = {"lmbda", "beta", "max_new_tokens", "temperature", "seq_kd", "padding_free"}
    own |= {"teacher_model_name_or_path", "teacher_model_init_kwargs", "model_init_kwargs", "remove_unused_columns"}
    return TrainerSpec(
        accepts=frozenset({Shape.MESSAGES, Shape.PROMPT_COMPLETION}),
        tokenized=True,
        teacher=True,
        args="trl.experimental.gkd.gkd_config:GKDConfig",
        owned=OWNED | OWNED_BY_ROWS | own | {"loss_type"},
    )


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """There is a teacher, with the student's vocabulary."""
    config = plan.config(Config)
    found = [*_sampled(plan, config), *without_dropout(plan), *in_range(config, from_0=("lmbda", "beta"))]
    for key in ("lmbda", "beta"):
        if getattr(config, key) > 1:
            found.append(Problem(f"trainer.{key}", f"is {getattr(config, key)}", "give a number from 0 to 1"))
    return [*found, *_teacher(plan, config)]


def _sampled(plan: Plan, config: Config) -> Iterator[Problem]:
    for problem in problems(plan, nucleus=False):
        if config.lmbda > 0 or problem.key == "trainer.packing":
            yield problem


def _teacher(plan: Plan, config: Config) -> Iterator[Problem]:
    key, model = "trainer.teacher", plan.run.model
    assert model is not None
    if config.teacher is None:
        if not model.tiny:
            yield Problem(key, "no teacher is named", "give a checkpoint folder or hub id: trainer.teacher=TEACHER")
        return
    folder = Path(config.teacher).expanduser()
    if not folder.is_dir():
        if config.teacher.startswith((".", "~", "/")) or config.teacher.count("/") > 1:
            yield Problem(key, f"there is no folder {config.teacher}", "name a checkpoint", Exit.MISSING_INPUT)
        return
    try:
        theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        ours = checkpoint.settings(model, plan.family).get("vocab_size")
    except (OSError, ValueError):
        yield Problem(key, f"{config.teacher} is no checkpoint: its config.json cannot be read", "name another folder")
        return
    except (Refused, KeyError):  # a problem of the model's own, named by another check
        return
    yield from vocabulary_problem({**theirs, **theirs.get("text_config", {})}.get("vocab_size"), ours)


def vocabulary_problem(theirs: int | None, ours: int | None) -> Iterator[Problem]:
    """Distributions over different tokens cannot be compared."""
    if theirs and ours and theirs != ours:
        message = f"has a vocabulary of {theirs} tokens, and the student one of {ours}"
        yield Problem("trainer.teacher", message, "name a teacher of the student's family")


@hookimpl
def ftcore_make_collator(tokenizer: Any) -> Any:
    """Rows with their prompts, for the student to complete."""
    from ftcore_trainers._gkd_trainer import DistillationCollator

    return DistillationCollator(tokenizer.pad_token_id)


@hookimpl
def ftcore_make_trainer(
    plan: Plan,
    model: Any,
    tokenizer: Any,
    dataset: Any,
    collator: Any,
    callbacks: Any,
    generator: Any,
    optimizer: Any,
) -> Trainer:
    """TRL's GKDTrainer, with completions from ftcore's generator."""
    from ftcore_trainers._arguments import early_stopping, quiet, shared
    from ftcore_trainers._dtypes import kept_dtypes
    from ftcore_trainers._experimental import experimental
    from ftcore_trainers._gkd_trainer import ChunkedGKDTrainer
    from ftcore_trainers._teacher import teacher_of

    with experimental():
        from trl.experimental.gkd import GKDConfig

    config = plan.config(Config)
    arguments = {
        "max_length": config.max_length,
        "max_new_tokens": config.max_completion_length,
        "lmbda": config.lmbda,
        "beta": config.beta,
        "temperature": config.temperature,
        **shared(plan, "eval" in dataset),
    }
    with kept_dtypes(model):
        return quiet(
            ChunkedGKDTrainer(
                generator=generator,
                max_completion_length=config.max_completion_length,
                model=model,
                teacher_model=teacher_of(plan, model),
                args=GKDConfig(**arguments),
                train_dataset=dataset["train"],
                eval_dataset=dataset.get("eval"),
                processing_class=tokenizer,
                data_collator=collator,
                callbacks=[*callbacks, *early_stopping(plan)],
                optimizers=(optimizer, None),
            )
        )
