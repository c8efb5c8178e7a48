"""A finished run's model, loaded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ftcore import hooks as h
from ftcore import pipeline
from ftcore.catalog import installed
from ftcore.config import RunConfig
from ftcore.errors import Exit, Problem, Refused, refuse
from ftcore.manager import Hooks, import_plugin
from ftcore.record import TRAINED
from ftcore.specs import Loaded, Plan


def trained_config(config: RunConfig) -> RunConfig:
    """The recorded config, turned to what the run trained: its adapter, or its full model.

    Raises Refused when the run folder holds neither.
    """
    if config.run is None:
        return config
    folder = Path(config.run) / TRAINED
    assert config.model is not None and config.adapter is not None
    if (folder / "adapter_config.json").is_file():
        if not hasattr(config.adapter, "path"):
            message = f"is {config.adapter.name}, and the run trained an adapter"
            raise Refused(Problem("adapter", message, "leave adapter= out"))
        adapter: Any = replace(config.adapter, path=str(folder))  # type: ignore[call-arg]
        return replace(config, adapter=adapter)
    if (folder / "config.json").is_file():
        # Longer contexts and new tokens are in what was saved.
        saved: Any = {"path": str(folder), "tiny": False, "shape": None}
        model = replace(config.model, **saved, rope_scaling={}, max_length=None, new_tokens=[])
        return replace(config, model=model)
    raise Refused(
        Problem(
            "run", f"{config.run} holds no trained model", "it may have failed: `ftcore runs` shows", Exit.MISSING_INPUT
        )
    )


def load_trained(config: RunConfig) -> Loaded:
    """Load what `run` trained, or the plain model when no run is named."""
    return pipeline.load(*prepared(config))


def prepared(config: RunConfig) -> tuple[Hooks, Plan]:
    """The hooks and the plan that load what `run` trained, with the head that its trainer gave the model."""
    bare = replace(trained_config(config), trainer=None, data=None, extra={}, reward={}, rewards=[])
    if config.trainer is None:
        return pipeline.prepare(bare)
    module = installed().find("trainer", config.trainer.name).load()
    also = getattr(module, "LOADED_WITH", None)
    hooks, plan = pipeline.prepare(bare, [import_plugin(also, "trainer")] if also else [])
    spec = Hooks.for_run(RunConfig(), installed(), [module]).first(h.ftcore_trainer_spec, config=config.trainer)
    plan = replace(plan, family=spec.headed(plan.family))
    refuse(hooks.collect(h.ftcore_check_plan, plan=plan))  # once more: not every export takes such a head
    return hooks, plan
