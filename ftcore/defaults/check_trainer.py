"""Checks of the trainer's numbers, and of the arguments that are passed through to its library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from ftcore.catalog import nearest
from ftcore.config import TrainerConfig
from ftcore.errors import Problem
from ftcore.sources import argument_names, enum_values
from ftcore.specs import Plan
from ftcore.specs.training import COLDEST

ABOVE_0 = ("learning_rate", "loraplus_ratio", "global_batch", "max_length", "logging_steps")
FROM_0 = (
    "weight_decay",
    "warmup",
    "max_grad_norm",
    "eval_steps",
    "save_steps",
    "early_stopping",
    "seed",
)

PARTS_OR_STEPS = ("eval_steps", "save_steps")
"""Below 1 a part of the run, else a number of steps."""
SCHEDULE_ARGUMENTS = {
    "cosine_with_min_lr": "min_lr_rate: 0.1",
    "cosine_warmup_with_min_lr": "min_lr_rate: 0.1",
    "warmup_stable_decay": "num_decay_steps: 10",
}
"""Schedules that do not work without an argument, and an example of it."""
SCHEDULES_BY_LOSS = ("reduce_lr_on_plateau", "greedy")
"""Schedules that follow the held-out loss."""


NEVER = frozenset({"trust_remote_code", "model_init_kwargs", "hub_token", "push_to_hub"})
"""Arguments of the libraries that would run a repository's code, or load or send a model past ftcore's own checks."""


INSTEAD = {"chat_template_path": "write data.template"}
"""Arguments for which ftcore has a key outside `trainer`."""
LEFT_OUT = frozenset({"label_smoothing_factor"})
"""Arguments that no key of ftcore's sets, where a trainer does not take them."""


def check_arguments(plan: Plan) -> Iterator[Problem]:
    """`trainer.args` has names that the library knows, and none that ftcore's own keys set."""
    trainer = plan.trainer
    if not (trainer and trainer.args and plan.run.trainer):
        return
    known = argument_names(trainer.args)
    for name in plan.run.trainer.args:
        key = f"trainer.args.{name}"
        if name in trainer.owned:
            fix = f"write trainer.{name}" if hasattr(plan.run.trainer, name) else INSTEAD.get(name, "leave it out")
            message = "is no part of ftcore's losses here" if name in LEFT_OUT else "is set by ftcore's own keys"
            yield Problem(
                key,
                message,
                f"{fix}; `ftcore plugins trainer/{plan.run.trainer.name}` lists them",
            )
        elif name in NEVER:
            yield Problem(key, "is not passed on: it would go past ftcore's own checks", "leave it out")
        elif name not in known:
            near = nearest(name, known)
            library = trainer.args.partition(":")[2]
            own = (
                f"did you mean trainer.{name}?"
                if hasattr(plan.run.trainer, name)
                else f"leave it out, or see the arguments of {library}"
            )
            yield Problem(
                key, f"{library} has no argument '{name}'", f"did you mean trainer.args.{near}?" if near else own
            )


def check_numbers(plan: Plan) -> Iterator[Problem]:
    """Every number is in its range, and the batch can be divided."""
    run, trainer = plan.run, plan.run.trainer
    yield from _range("sampling", run.sampling, above_0=("max_new_tokens",), from_0=("temperature",))
    if 0 < run.sampling.temperature < COLDEST:
        fix = f"give 0 for the likeliest token each time, or {COLDEST:g} and above"
        yield Problem("sampling.temperature", f"is {run.sampling.temperature}", fix)
    if not 0 < run.sampling.top_p <= 1:
        yield Problem("sampling.top_p", f"is {run.sampling.top_p}", "give a number above 0 and up to 1")
    if run.model and run.model.max_length is not None:
        yield from _range("model", run.model, above_0=("max_length",))
    if trainer is None:
        return
    own_rate = () if trainer.embedding_learning_rate is None else ("embedding_learning_rate",)
    yield from _range("trainer", trainer, (*ABOVE_0, *own_rate), FROM_0)
    for key in PARTS_OR_STEPS:
        value = getattr(trainer, key)
        if 1 < value < math.inf and value != int(value):
            yield Problem(f"trainer.{key}", f"is {value}", "give a whole number of steps, or a part of the run below 1")
    if trainer.micro_batch < -1:
        fix = "give a number of rows, 0 for the global batch up to 8, or -1 to leave it to the forecast"
        yield Problem("trainer.micro_batch", f"is {trainer.micro_batch}", fix)
    if trainer.micro_batch > 0 and trainer.global_batch > 0 and trainer.global_batch % trainer.micro_batch:
        divisors = [str(n) for n in range(1, trainer.global_batch + 1) if trainer.global_batch % n == 0]
        message = f"{trainer.micro_batch} does not divide trainer.global_batch={trainer.global_batch}"
        yield Problem(
            "trainer.micro_batch", message, f"every step has the same number of rows: use {', '.join(divisors[-6:])}"
        )
    if trainer.max_steps == 0 or trainer.max_steps < -1:
        yield Problem(
            "trainer.max_steps", f"is {trainer.max_steps}", "give a number above 0, or -1 to let trainer.epochs decide"
        )
    if trainer.max_steps == -1 and not 0 < trainer.epochs < math.inf:
        yield Problem(
            "trainer.epochs", f"is {trainer.epochs} and trainer.max_steps is not set", "set one of them above 0"
        )
    yield from _schedule(trainer)


def _schedule(trainer: TrainerConfig) -> Iterator[Problem]:
    """The schedule exists, and has what it needs."""
    known = enum_values("transformers.trainer_utils:SchedulerType")
    if known and trainer.schedule not in known:
        near = nearest(trainer.schedule, known)
        fix = f"did you mean trainer.schedule={near}?" if near else f"schedules: {', '.join(known)}"
        yield Problem("trainer.schedule", f"there is no schedule '{trainer.schedule}'", fix)
    example = SCHEDULE_ARGUMENTS.get(trainer.schedule)
    if example and not trainer.args.get("lr_scheduler_kwargs"):
        fix = f"add 'trainer.args.lr_scheduler_kwargs={{{example}}}', or use trainer.schedule=cosine"
        yield Problem("trainer.schedule", f"'{trainer.schedule}' needs an argument of its own", fix)
    if trainer.schedule in SCHEDULES_BY_LOSS and not trainer.eval_steps:
        fix = "set trainer.eval_steps, such as trainer.eval_steps=50, or use trainer.schedule=cosine"
        yield Problem("trainer.schedule", f"'{trainer.schedule}' needs evaluations while it trains", fix)


def _range(path: str, config: object, above_0: Iterable[str] = (), from_0: Iterable[str] = ()) -> Iterator[Problem]:
    for key in above_0:
        if not 0 < getattr(config, key) < math.inf:
            yield Problem(f"{path}.{key}", f"is {getattr(config, key)}", "give a number above 0")
    for key in from_0:
        if not 0 <= getattr(config, key) < math.inf:
            yield Problem(f"{path}.{key}", f"is {getattr(config, key)}", "give 0 or a number above it")
