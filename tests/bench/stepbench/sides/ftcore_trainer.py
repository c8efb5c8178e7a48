"""ftcore's own trainer plugin, made by the hooks as in a run, on rows of random tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from stepbench import trainers
from stepbench.sides.ftcore import described, prepared
from stepbench.works import Work


def run(work: Work) -> dict[str, Any]:
    """The steps of `pipeline.run` from loading to training, with the data set given instead of read."""
    from ftcore import pipeline

    steps = trainers.StepMeter(work)
    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = prepared(work, scratch)
        loaded = pipeline.load(hooks, plan)
        trainer = trained(hooks, plan, loaded, trainers.dataset(work, labels=True), steps)
    return {**steps.meter.result(trainers.first_loss(trainer)), **described(work, loaded)}


def trained(
    hooks: Any, plan: Any, loaded: Any, rows: Any, callback: Any, rewards: Sequence[Any] = (), generator: Any = None
) -> Any:
    """The trainer plugin's trainer, after it has trained on the rows."""
    from ftcore import hooks as h

    trainer = made(hooks, plan, loaded, rows, [callback], rewards, generator)
    hooks.first(h.ftcore_train, plan=plan, trainer=trainer)
    return trainer


def made(
    hooks: Any,
    plan: Any,
    loaded: Any,
    rows: Any,
    callbacks: Sequence[Any] = (),
    rewards: Sequence[Any] = (),
    generator: Any = None,
) -> Any:
    """The trainer plugin's trainer, before it trains on the rows."""
    from ftcore import hooks as h

    plan.output_dir.mkdir(parents=True)
    return hooks.first(
        h.ftcore_make_trainer,
        plan=plan,
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        dataset={"train": rows},
        collator=hooks.maybe(h.ftcore_make_collator, plan=plan, tokenizer=loaded.tokenizer),
        rewards=list(rewards),
        callbacks=[*hooks.collect(h.ftcore_callbacks, plan=plan), *callbacks],
        generator=generator,
        optimizer=hooks.maybe(h.ftcore_make_optimizer, plan=plan, model=loaded.model),
    )
