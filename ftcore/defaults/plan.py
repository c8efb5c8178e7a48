"""The plan: what was decided, from the answers to the describe hooks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ftcore import hooks as specs
from ftcore.config import RunConfig
from ftcore.device import Device
from ftcore.errors import Problem, Refused
from ftcore.paths import new_run_dir, run_name
from ftcore.specs import Plan

if TYPE_CHECKING:
    from ftcore.manager import Hooks


class PlanMaker:
    """Answers `ftcore_make_plan`; it is an object because it asks the other hooks of the same run."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks

    @specs.hookimpl(trylast=True)
    def ftcore_make_plan(self, config: RunConfig, device: Device) -> Plan:
        """Describe the selected model, data and trainer, and collect what the kernel sets offer."""
        hooks = self._hooks
        if config.model is None:
            raise Refused(
                Problem("model", "no model is selected", "add +model=NAME; `ftcore plugins model` lists them")
            )
        family = hooks.first(specs.ftcore_model_family, config=config.model)
        trainer = hooks.first(specs.ftcore_trainer_spec, config=config.trainer) if config.trainer else None
        family = trainer.headed(family) if trainer else family
        return Plan(
            run=config,
            family=family,
            format=hooks.maybe(specs.ftcore_data_format, config=config.data) if config.data else None,
            trainer=trainer,
            kernels=tuple(hooks.collect(specs.ftcore_kernels, family=family, device=device)),
            device=device,
            output_dir=_output_dir(config),
            plugins=hooks.infos(),
        )


def _output_dir(config: RunConfig) -> Path:
    if config.output_dir:
        return Path(config.output_dir)
    return new_run_dir(run_name(config))
