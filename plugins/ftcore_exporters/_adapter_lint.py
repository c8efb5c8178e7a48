"""What servers make of an adapter folder, told from its files: loaded, refused, or loaded as something else.

The rules are those of vLLM 0.32 (`lora/peft_helper.py`, `lora/lora_model.py`) and SGLang 0.5.23 (`srt/lora/`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftcore import Plan, Problem, Refused
from ftcore.errors import Exit
from ftcore_exporters._merging import value

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank` that are of use."""
PREFIX = "base_model.model."
"""What PEFT writes in front of the base model's own names."""
HARMLESS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""`init_lora_weights` after which the base model's weights are as they were."""
EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Lint:
    """What was found in an adapter folder."""

    modules: int
    """Low-rank pairs whose B is not zero."""
    rank: int
    """The highest rank among them."""
    max_lora_rank: int | None
    """vLLM's `--max-lora-rank` for it; None where it has none that high."""
    vllm: tuple[str, ...]
    """Why vLLM refuses it, or serves something else."""
    sglang: tuple[str, ...]
    """Why SGLang refuses it, or serves something else."""

    def checks(self) -> dict[str, Any]:
        """As `run.json` keeps it."""
        return {
            "modules": self.modules,
            "rank": self.rank,
            "max_lora_rank": self.max_lora_rank,
            "vllm_refuses": list(self.vllm),
            "sglang_refuses": list(self.sglang),
        }


def lint(folder: Path, serving_names: frozenset[str] | None = None) -> Lint:
    """Read an adapter folder as servers do.

    :param serving_names: `serving_names(plan)`; None skips the check of names.

    Raises Refused for a folder that is no adapter, or one that changes nothing.
    """
    config, tensors = _read(folder)
    pairs = {name for name in tensors if re.search(r"\.lora_(embedding_)?B\b", name)}
    effective = [name for name in pairs if tensors[name]]
    if not effective:
        found = "every B matrix is zero" if pairs else "there are no LoRA matrices in it"
        message = f"the adapter has 0 effective modules: {found}"
        raise Refused(Problem(str(folder), message, "train it first, or check adapter.targets", Exit.DATA))
    rank = _rank(config)
    both = (*config_faults(config), *_name_faults(tensors, serving_names))
    fitting = next((allowed for allowed in RANKS if allowed >= rank), None)
    return Lint(
        len(effective),
        rank,
        fitting,
        (*both, *vllm_faults(config, tensors)),
        (*both, *sglang_faults(config, tensors)),
    )


def _rank(config: Mapping[str, Any]) -> int:
    return max([int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values())])


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, bool]]:
    """The config, and names of tensors to whether any value is not zero."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            tensors = {name: bool(file.get_tensor(name).any()) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        message = f"is no adapter folder: {error}"
        raise Refused(Problem(str(folder), message, "export it again", Exit.DATA)) from error
    return config, tensors


def config_faults(config: Mapping[str, Any]) -> Iterator[str]:
    """What neither server takes.

    :param config: as `adapter_config.json` has it.
    """
    if config.get("use_dora"):
        yield "DoRA is not supported"
    if config.get("bias", "none") != "none" or config.get("lora_bias"):
        yield "trained biases are not supported"
    if config.get("trainable_token_indices"):
        yield "trained rows of the embedding are not supported"
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in HARMLESS:
        yield f"init_lora_weights={init} changes the weights under the adapter, which servers read from the checkpoint"


def _name_faults(tensors: Mapping[str, Any], serving_names: frozenset[str] | None) -> Iterator[str]:
    """Pairs that a server does not find in its model."""
    strange = [name for name in tensors if not name.startswith(PREFIX)]
    if strange:
        yield f"'{strange[0]}' does not start with {PREFIX}"
    if serving_names is not None:
        modules = {module for name in tensors if (module := _module(name)) and ".experts" not in name}
        if lost := sorted(modules - serving_names):
            yield f"the class that the base is served as has no module '{lost[0]}': its adapter would be ignored"


def _module(name: str) -> str | None:
    found = re.match(rf"(?:{re.escape(PREFIX)})?(.+?)\.lora_(?:embedding_)?[AB]\b", name)
    return found.group(1) if found else None


def serving_names(plan: Plan) -> frozenset[str] | None:
    """Paths of the modules of the class that a server loads the base checkpoint as; None where that is not known.

    It is the class that the checkpoint's own config names, which may be another than the one that was trained: of a
    model with a vision part, its text part alone can be trained, and has other paths.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    from ftcore import checkpoint

    model = plan.run.model
    assert model is not None
    config = AutoConfig.from_pretrained(
        checkpoint.locate(model, plan.family), revision=model.revision, trust_remote_code=False
    )
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None:
        return None
    with torch.device("meta"):
        return frozenset(name for name, _ in cls(config).named_modules())


def planned(plan: Plan) -> tuple[dict[str, Any], dict[str, bool]]:
    """What `adapter_config.json` will say, as far as the run's own config tells, and names that stand for experts."""
    adapter: Any = plan.run.adapter
    chosen = list(getattr(adapter, "targets", None) or plan.family.lora_targets)
    experts = [name for name in plan.family.lora_parameters if "experts" in name]
    if getattr(adapter, "targets", None):
        experts = [name for name in experts if name in chosen]
    variant, init = (value(getattr(adapter, name, None)) for name in ("variant", "init"))
    config = {
        "r": getattr(adapter, "r", 1),
        "use_dora": variant == "dora",
        "use_rslora": variant == "rslora",
        # What LoftQ starts with is saved as a plain adapter.
        "init_lora_weights": True if init in (None, "default", "loftq") else init,
        "modules_to_save": getattr(adapter, "modules_to_save", None),
        "trainable_token_indices": plan.run.model.new_tokens if plan.run.model else None,
        "target_modules": chosen,
    }
    return config, {f"{PREFIX}.{name}": True for name in experts}


def _whole(config: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(config.get("modules_to_save") or ()))  # PEFT names those of a head once for each load


def _on_experts(tensors: Mapping[str, Any]) -> bool:
    return any(".experts." in name for name in tensors)


def vllm_faults(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[str]:
    """What vLLM does not take besides.

    :param tensors: by the names that PEFT gives them.
    """
    if whole := [name for name in _whole(config) if name not in ("classifier", "score")]:
        yield f"modules_to_save={whole} is not supported"
    if (rank := _rank(config)) > RANKS[-1]:
        yield f"rank {rank} is above its highest, {RANKS[-1]}"
    if _on_experts(tensors):
        yield "adapters of experts held as one tensor are taken for a few model classes alone, such as gpt-oss"


def sglang_faults(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[str]:
    """What SGLang does not take besides, or takes for something else.

    :param tensors: by the names that PEFT gives them.
    """
    if whole := _whole(config):
        yield f"modules_to_save={whole} is ignored: the base model's own would answer"
    if config.get("use_rslora"):
        yield "rsLoRA is ignored: it would be scaled by alpha / r"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        yield "ranks and alphas of single modules are ignored"
    targets = config.get("target_modules") or []
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield "target_modules is an expression; a list of names is needed"
    elif {"q_proj", "k_proj"} & set(targets) and not {"q_proj", "v_proj"} <= set(targets):
        yield "q_proj and v_proj must both be adapted where one of the attention's inputs is"
    if _on_experts(tensors):
        yield "adapters of experts held as one tensor by PEFT are not known to be read"
