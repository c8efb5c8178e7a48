"""ftcore's own trainer plugin, made by the hooks as in a run, on rows of random tokens."""

from __future__ import annotations

import tempfile
from typing import Any

from stepbench import trainers
from stepbench.sides.ftcore import described, prepared
from stepbench.works import Work


def run(work: Work) -> dict[str, Any]:
    """The steps of `pipeline.run` from loading to training, with the data set given instead of read."""
    from ftcore import hooks as h
    from ftcore import pipeline

    steps = trainers.StepMeter(work)
    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = prepared(work, scratch)
        plan.output_dir.mkdir(parents=True)
        loaded = pipeline.load(hooks, plan)
        trainer = hooks.first(
            h.ftcore_make_trainer,
            plan=plan,
            model=loaded.model,
            tokenizer=loaded.tokenizer,
            dataset={"train": trainers.dataset(work, labels=True)},
            collator=hooks.maybe(h.ftcore_make_collator, plan=plan, tokenizer=loaded.tokenizer),
            rewards=[],
            callbacks=[*hooks.collect(h.ftcore_callbacks, plan=plan), steps],
            generator=None,
            optimizer=hooks.maybe(h.ftcore_make_optimizer, plan=plan, model=loaded.model),
        )
        hooks.first(h.ftcore_train, plan=plan, trainer=trainer)
    return {**steps.meter.result(trainers.first_loss(trainer)), **described(work, loaded)}
