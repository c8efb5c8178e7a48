"""The LoRA adapter as a PEFT folder."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, ExportConfig, Plan, Problem, hookimpl
from ftcore.paths import whole_folder


@dataclass
class Config(ExportConfig):
    """The adapter export has no settings of its own."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """There must be an adapter."""
    if plan.run.adapter is not None and plan.run.adapter.name == "full":
        return [Problem("export", "adapter=full trains no adapter that could be exported", "use +export=[safetensors]")]
    return []


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """`adapter_model.safetensors`, `adapter_config.json` and the tokenizer under `export/adapter`."""
    target = plan.output_dir / "export" / "adapter"
    with whole_folder(target) as folder:
        checkpoint.model.save_pretrained(folder)  # type: ignore[operator]
        checkpoint.tokenizer.save_pretrained(folder)
    return [Artifact.of("adapter", target)]
