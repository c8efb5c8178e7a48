"""ftcore's model in a bare loop."""

from __future__ import annotations

import tempfile
from typing import Any

from stepbench.loop import measure
from stepbench.works import FREE, Work


def run(work: Work) -> dict[str, Any]:
    """`pipeline.load`, then the same loop as the peers'."""
    from ftcore import hooks as h
    from ftcore import pipeline

    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = prepared(work, scratch)
        loaded = pipeline.load(hooks, plan)
        optimizer = hooks.maybe(h.ftcore_make_optimizer, plan=plan, model=loaded.model)
        result = measure(work, loaded.model, free=True, optimizer=optimizer)
    return {**result, **described(work, loaded)}


def prepared(work: Work, scratch: str) -> tuple[Any, Any]:
    """Hooks and plan of the ftcore command of the work."""
    from ftcore import pipeline
    from ftcore.api import validated

    return pipeline.prepare(validated(overrides(work, scratch)))


def overrides(work: Work, scratch: str) -> list[str]:
    """The ftcore command; the trainer's numbers also tell `memory=auto` how much there is to keep."""
    return [
        *model_words(work),
        "+trainer=sft",
        *trainer_words(work, scratch, work.total + FREE),
        "trainer.learning_rate=1e-4",
        f"trainer.logging_steps={FREE}",
        "+trainer.args.train_sampling_strategy=sequential",
    ]


def model_words(work: Work) -> list[str]:
    """Weights, adapter, kernels and memory."""
    mode, _, limit = work.memory.partition("@")
    return [
        f"+model={work.family}",
        f"model.path={work.folder}",
        *([] if work.quantizer == "none" else [f"+quantizer={work.quantizer}"]),
        *([f"adapter.r={work.rank}", "adapter.alpha=32"] if work.rank else ["adapter=full"]),
        f"kernels=[{work.kernels}]",
        f"memory={mode}",
        *([f"memory_limit={limit}"] if limit else []),
    ]


def trainer_words(work: Work, scratch: str, steps: int, rows: int = 0) -> list[str]:
    """A step is one micro-batch of so many rows of the data set, the work's where none are given."""
    return [
        f"trainer.micro_batch={rows or work.rows}",
        f"trainer.global_batch={rows or work.rows}",
        f"trainer.max_length={work.length}",
        f"trainer.max_steps={steps}",
        "+trainer.args.logging_first_step=true",
        f"trainer.optimizer={optimizer(work)}",
        f"output_dir={scratch}/run",
    ]


def optimizer(work: Work) -> str:
    """The optimizer of the bare loops by transformers' name."""
    return "adamw_8bit" if work.optimizer == "adamw8bit" and work.device == "cuda" else "adamw_torch_fused"


def described(work: Work, loaded: Any) -> dict[str, Any]:
    """The command, and what was patched."""
    return {
        "ftcore": " ".join(overrides(work, "SCRATCH")),
        "claims": len(loaded.patches.claims),
        "skipped": [str(skip) for skip in loaded.patches.skipped],
    }
