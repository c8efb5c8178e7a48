"""Completions by a vLLM engine in this process, on the GPU that trains (Kwon et al. 2023, arXiv 2309.06180).

Written against the source of vLLM 0.26, 0.32 and 0.33; the last asks for a torch that ftcore does not take yet.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import GeneratorConfig, Plan, Problem, Refused, checkpoint, hookimpl

if TYPE_CHECKING:
    from ftcore.specs import Generator

REQUIRES = ("vllm>=0.26,<0.33",)
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""
NARROWEST = 32
"""Size of an attention head that all of vLLM's usual attention kernels take."""
OTHER = "use generator=transformers"


@dataclass
class Config(GeneratorConfig):
    """The vLLM generator's settings."""

    memory_fraction: float = 0.3
    """Part of the GPU's memory for vLLM's weights and key-value cache while it writes; as much must be free then."""
    max_length: int | None = None
    """Longest prompt with its completion, in tokens; null takes `trainer.max_length` and a completion, up to the
    model's context."""
    max_sequences: int = 256
    """Completions written at once."""
    sleep: bool = True
    """Give the memory back between rollouts. The weights wait in host memory; with `adapter=full` they are dropped,
    and handed over again."""
    enforce_eager: bool = False
    """Record no CUDA graphs: starts sooner, writes slower, and leaves training more memory."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A GPU, one process, and weights that vLLM can be given."""
    return [*_machine(plan), *_numbers(plan.config(Config)), *_model(plan), *_adapter(plan)]


@hookimpl
def ftcore_make_generator(plan: Plan, model: Any, tokenizer: Any) -> Generator:
    """A generator whose engine starts with the first rollout."""
    from ftcore_generators._vllm_generator import VllmGenerator

    return VllmGenerator(plan, plan.config(Config), model, tokenizer)


def _machine(plan: Plan) -> Iterator[Problem]:
    if plan.device.kind != "cuda":
        yield Problem("generator", "vllm needs a GPU, and there is none", OTHER)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "vllm completes the prompts of one process, and this run has several"
        yield Problem("generator", message, f"start one process, or {OTHER}")
    config, run = plan.config(Config), plan.run
    if not config.sleep and run.memory.value == "auto" and run.memory_limit is None:
        message = "vllm would keep memory that memory=auto counts as free"
        yield Problem("generator.sleep", message, "set memory_limit to the GiB that training may take, or leave it on")


def _numbers(config: Config) -> Iterator[Problem]:
    if not 0 < config.memory_fraction < 1:
        message = f"is {config.memory_fraction}"
        yield Problem("generator.memory_fraction", message, "give a number above 0 and below 1, such as 0.3")
    if config.max_length is not None and config.max_length < 2:
        yield Problem("generator.max_length", f"is {config.max_length}", "give a number of tokens, or null")
    if config.max_sequences < 1:
        yield Problem("generator.max_sequences", f"is {config.max_sequences}", "give a number above 0")


def _model(plan: Plan) -> Iterator[Problem]:
    run, model = plan.run, plan.run.model
    assert model is not None
    if plan.family.vision is not None:
        yield Problem("generator", f"vllm is given text models only, and {model.name} reads images", OTHER)
    if run.quantizer is not None:
        message = f"vllm is given plain weights, and those of {run.quantizer.name} are packed"
        yield Problem("quantizer", message, f"leave the quantizer out, or {OTHER}")
    try:
        known = checkpoint.settings(model, plan.family)
    except (Refused, KeyError):  # a problem of the checkpoint's own, named by another check
        return
    if known.get("quantization_config"):
        yield Problem("model", "vllm is given plain weights, and the checkpoint's are packed", OTHER)
    heads = known.get("num_attention_heads")
    size = known.get("head_dim") or (known["hidden_size"] // heads if heads and known.get("hidden_size") else None)
    if size is not None and size < NARROWEST:
        message = f"has attention heads of {size} numbers, and vllm takes {NARROWEST} or more"
        yield Problem("model.tiny" if model.tiny else "model", message, f"take a real checkpoint, or {OTHER}")


def _adapter(plan: Plan) -> Iterator[Problem]:
    adapter: Any = plan.run.adapter
    if getattr(adapter, "name", None) != "lora":
        return
    has = _features(plan, adapter)
    if has["use_dora"]:
        yield Problem("adapter.variant", "vllm has no DoRA", f"use adapter.variant=rslora, or {OTHER}")
    if has["init_lora_weights"] in ("pissa", "olora"):
        message = "changes the weights under the adapter, which vllm reads from the checkpoint"
        yield Problem("adapter.init", message, f"use adapter.init=default, or {OTHER}")
    if has["modules_to_save"]:
        message = "vllm takes low-rank matrices alone, and no module that is trained whole"
        yield Problem("adapter.modules_to_save", message, f"leave it out, or {OTHER}")
    if has["trainable_token_indices"]:
        message = "vllm takes low-rank matrices alone, and no rows of the embedding"
        yield Problem("model.new_tokens", message, f"use adapter=full, or {OTHER}")
    if has["target_parameters"]:
        message = f"vllm is given adapters of linear layers only, not of {', '.join(has['target_parameters'])}"
        yield Problem("adapter.targets", message, f"name linear layers alone, or {OTHER}")
    if has["r"] > RANKS[-1]:
        yield Problem("adapter.r", f"is {has['r']}, and vllm takes up to {RANKS[-1]}", f"use a lower one, or {OTHER}")


def _features(plan: Plan, adapter: Any) -> Mapping[str, Any]:
    """What the adapter's PEFT config says, or will say."""
    chosen = adapter.targets
    asked = {
        "r": adapter.r,
        "use_dora": adapter.variant.value == "dora",
        "init_lora_weights": adapter.init.value,
        "modules_to_save": adapter.modules_to_save,
        "trainable_token_indices": plan.run.model.new_tokens if plan.run.model else (),
        "target_parameters": [name for name in plan.family.lora_parameters if not chosen or name in chosen],
    }
    if not adapter.path:
        return asked
    try:
        saved = json.loads((Path(adapter.path) / "adapter_config.json").read_text(encoding="utf-8"))
        return {name: saved.get(name, value if name == "r" else None) for name, value in asked.items()}
    except (OSError, ValueError, AttributeError):  # a problem that the adapter's own check names
        return asked
