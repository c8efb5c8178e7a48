"""The LoRA adapter as a PEFT folder, checked for what vLLM and SGLang take."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore.config import ReadBackConfig

BITS_PER_WEIGHT = 0
"""Of the adapter's weights alone: the disk needs no room for the model's."""


@dataclass
class Config(ReadBackConfig):
    """The adapter export has no settings of its own."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """There must be an adapter."""
    from ftcore_exporters._adapter_folder import problems

    return problems(plan)


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """`adapter_model.safetensors`, `adapter_config.json` and the tokenizer under `export/adapter`.

    Raises Refused for an adapter that changes nothing.
    """
    from ftcore.paths import whole_folder
    from ftcore.report import note
    from ftcore_exporters._adapter_folder import read_back, write
    from ftcore_exporters._adapter_lint import lint, serving_names
    from ftcore_exporters._merging import makes_up_for_rounding

    target = plan.output_dir / "export" / "adapter"
    with whole_folder(target) as folder:
        write(checkpoint, folder)
        found = lint(folder, serving_names(plan))
    for server, reasons in (("vLLM", found.vllm), ("SGLang", found.sglang)):
        for reason in reasons:
            note(f"adapter: {server} will not serve it as it was trained: {reason}; export the merged model for it")
    checks = read_back(checkpoint, target) if plan.config(Config).verify else {}
    rank = f", vLLM with --max-lora-rank {found.max_lora_rank}" if found.max_lora_rank and not found.vllm else ""
    if makes_up_for_rounding(plan):
        quantizer = plan.run.quantizer.name if plan.run.quantizer else ""
        note(
            f"adapter: it began with loftq, so it is right only over the base quantized by {quantizer}, as in training"
        )
    said = f"rank {found.rank}, {found.modules} modules; for PEFT{rank}"
    return [Artifact.of("adapter", target, said, {**checks, "lint": found.checks()})]
