"""A folder for vLLM with the command that serves it: the merged model, or the adapter over its base.

Options and limits are those of vLLM 0.32.
"""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore_exporters import _adapter_lint
from ftcore_exporters._served import ServedConfig, Server


@dataclass
class Config(ServedConfig):
    """The vLLM export's settings."""


SERVER = Server(
    name="vllm",
    title="vLLM",
    start=("vllm", "serve"),
    served="served-model-name",
    context="max-model-len",
    faults=lambda found: found.vllm,
    planned_faults=_adapter_lint.vllm_faults,
    adapter=lambda name, rank: {"enable-lora": True, "max-lora-rank": rank, "lora-modules": f"{name}=."},
    ends={"generation-config": "."},
)


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A model that writes text, and for an adapter what vLLM takes."""
    from ftcore_exporters._served import problems

    return problems(plan, SERVER, plan.config(Config))


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """The folder `export/vllm` with SERVE.md, read back by transformers or PEFT, and by vLLM where it is installed."""
    from ftcore_exporters._engine import by_vllm
    from ftcore_exporters._served import artifact, export, read_back

    config = plan.config(Config)
    target = export(plan, checkpoint, SERVER, config)
    checks = {**read_back(checkpoint, target), "vllm": by_vllm(checkpoint, target)} if config.verify else {}
    return [artifact(SERVER, config, target, checks)]
