"""GGUF files for llama.cpp, Ollama and LM Studio: written in Python, in any of llama.cpp's types."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore.catalog import nearest
from ftcore.config import ReadBackConfig

REQUIRES = ("gguf>=0.18", "libgguf>=0.2.2")


@dataclass
class Config(ReadBackConfig):
    """The GGUF export's settings."""

    types: list[str] = field(default_factory=lambda: ["q8_0"])
    """Types to write, one file each: f32, f16, bf16, q8_0, q4_0, q4_1, q5_0, q5_1, q2_k, q3_k_s, q3_k_m, q3_k_l,
    q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k."""
    lora: bool = False
    """Write the adapter alone as well, in float32, for `llama-server --lora` over the base model's own file; with
    `types=[]` nothing else."""
    finetune: str | None = None
    """What this fine-tune is called in the file and its name; null takes the run folder's name."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Types that exist, and a model that llama.cpp can compute."""
    from ftcore_exporters.gguf.checks import config_problems
    from ftcore_exporters.gguf.mixes import FILE_TYPES

    config, found = plan.config(Config), []
    for kind in config.types:
        if kind not in FILE_TYPES:
            near = nearest(kind.lower(), FILE_TYPES)
            fix = f"did you mean {near}?" if near else f"use some of {', '.join(FILE_TYPES)}"
            found.append(Problem("export.gguf.types", f"'{kind}' is no type", fix))
    if (not config.types and not config.lora) or len(set(config.types)) != len(config.types):
        message = "is empty" if not config.types else "names a type twice"
        found.append(Problem("export.gguf.types", message, "such as export.gguf.types=[q8_0,q4_k_m]"))
    found += config_problems(plan)
    if config.lora:
        from ftcore_exporters.gguf.lora import lora_problems

        found += lora_problems(plan)
    return found


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """One file of each type under `export/gguf`, and those for images and of the adapter alone."""
    return list(_written(plan, checkpoint))


def _written(plan: Plan, checkpoint: Checkpoint) -> Iterator[Artifact]:
    from ftcore_exporters.gguf.export import write_adapter, write_files, write_vision

    config = plan.config(Config)
    target = plan.output_dir / "export" / "gguf"
    for file, note in write_files(checkpoint, target, config.types, config.finetune):
        checks: Mapping[str, Any] = {}
        if config.verify:
            from ftcore.read_back import read_back_gguf

            checks = read_back_gguf(checkpoint, file)
        yield Artifact.of("gguf", file, note=note, checks=checks)
    if config.types and (images := write_vision(checkpoint, target, config.finetune)) is not None:
        checks = {"verified": False, "reason": "images are not read back"} if config.verify else {}
        yield Artifact.of("gguf", images, note="reads images: llama-server --mmproj", checks=checks)
    if config.lora:
        file = write_adapter(checkpoint, target, config.finetune)
        # An adapter is read over a file of its base, which is not among the exports.
        checks = {"verified": False, "reason": "needs a GGUF of the base model"} if config.verify else {}
        yield Artifact.of("gguf", file, note="LoRA for llama-server --lora", checks=checks)
