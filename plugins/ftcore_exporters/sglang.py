"""A folder for SGLang with the command that serves it: the merged model, or the adapter over its base.

Options and limits are those of SGLang 0.5.23.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore_exporters import _adapter_lint
from ftcore_exporters._served import ServedConfig, Server


@dataclass
class Config(ServedConfig):
    """The SGLang export's settings."""


SERVER = Server(
    name="sglang",
    title="SGLang",
    start=("python", "-m", "sglang.launch_server", "--model-path"),
    served="served-model-name",
    context="context-length",
    faults=lambda found: found.sglang,
    planned_faults=_adapter_lint.sglang_faults,
    adapter=lambda name, rank: {"enable-lora": True, "lora-paths": f"{name}=."},
)


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A model that writes text, and for an adapter what SGLang takes."""
    from ftcore_exporters._served import problems

    return problems(plan, SERVER, plan.config(Config))


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """The folder `export/sglang` with SERVE.md, read back by transformers or PEFT; SGLang itself is not started."""
    from ftcore_exporters._served import artifact, export, read_back

    config = plan.config(Config)
    target = export(plan, checkpoint, SERVER, config)
    checks = {**read_back(checkpoint, target), "sglang": "unverified"} if config.verify else {}
    return [artifact(SERVER, config, target, checks)]
