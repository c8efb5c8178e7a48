"""ftcore's own trainer plugins, made by the hooks as in a run."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepbench.sides.ftcore import model_words, trainer_words
from stepbench.sides.ftcore_trainer import trained

from rlbench import rows
from rlbench.meter import TrainingMeter
from rlbench.works import TrainerWork


def run(work: TrainerWork) -> dict[str, Any]:
    """The steps of `pipeline.run` from loading to training, with the data set given instead of read."""
    from ftcore import pipeline
    from ftcore.api import validated

    steps = TrainingMeter(work)
    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = pipeline.prepare(validated(overrides(work, scratch)))
        loaded = pipeline.load(hooks, plan)
        given = rows.dataset(work, loaded.tokenizer)
        more = {"rewards": [rows.by_place], "generator": Given(work, loaded.tokenizer)}
        trainer = trained(hooks, plan, loaded, given, steps, **(more if work.trainer == "grpo" else {}))
        found = steps.result(trainer)
    return {**found, "ftcore": " ".join(overrides(work, "SCRATCH")), "claims": len(loaded.patches.claims)}


def overrides(work: TrainerWork, scratch: str) -> list[str]:
    """The ftcore command. The learning rate is TRL's default, so that later losses compare as well."""
    special = {
        "dpo": ["+trainer.args.train_sampling_strategy=sequential"],
        "kto": [],
        "grpo": [
            "+trainer.args.shuffle_dataset=false",
            f"trainer.num_generations={work.group}",
            f"trainer.max_completion_length={work.length - work.prompt}",
            f"generator={work.generator}",
            f"trainer.share_prompts={str(work.shared).lower()}",
        ],
    }[work.trainer]
    return [
        *model_words(work),
        f"+trainer={work.trainer}",
        *trainer_words(work, scratch, work.total, work.batch),
        "trainer.learning_rate=1e-6",
        "trainer.logging_steps=10",
        *special,
    ]


@dataclass(frozen=True)
class Given:
    """A generator whose completions are there already."""

    work: TrainerWork
    tokenizer: Any

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Any) -> Any:
        """One per prompt."""
        from ftcore import Completions

        return Completions(ids=rows.completions(self.work, self.tokenizer, prompt_ids))

    def begin_rollout(self) -> None:
        """Nothing to take."""

    def end_rollout(self) -> None:
        """Nothing to give back."""

    def weights_changed(self) -> None:
        """Nothing to follow."""
