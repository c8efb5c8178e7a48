"""RoPE as llama.cpp reads it: keys, and tensors of factors for the scalings that need them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftcore.gguf_facts import Gguf, Value

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


def rope_keys(config: PretrainedConfig, facts: Gguf, head_dim: int) -> dict[str, Value]:
    """Keys after `{arch}.` of base, width and scaling."""
    full, local = parameters(config)
    rotated = int(head_dim * full.get("partial_rotary_factor", 1.0))
    keys: dict[str, Value] = {"rope.dimension_count": rotated, "rope.freq_base": float(full["rope_theta"])}
    if local is not None:
        keys["rope.freq_base_swa"] = float(local["rope_theta"])
    scaling = full.get("rope_type", "default")
    if scaling in ("linear", "yarn", "longrope"):
        keys["rope.scaling.type"] = scaling
    if scaling in ("linear", "yarn"):
        keys["rope.scaling.factor"] = float(full["factor"])
    if scaling in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = int(original_length(config, full))
    if scaling == "longrope":
        keys["rope.scaling.attn_factor"] = _attention_factor(config)
    if scaling == "yarn":
        keys |= _yarn(config, full)
    return keys


def rope_factors(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """What frequencies are divided by, `[rotated width / 2]` in float32, by the names of their tensors."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full, _ = parameters(config)
    if full.get("rope_type") == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = full["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
        return {"rope_freqs.weight": plain / scaled}
    if full.get("rope_type") == "longrope":
        return {f"rope_factors_{kind}.weight": torch.tensor(full[f"{kind}_factor"]) for kind in ("long", "short")}
    return {}


def parameters(config: PretrainedConfig) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    """transformers' RoPE parameters of layers with full attention, and of those with a window where they differ."""
    rope = config.rope_parameters
    if "full_attention" in rope:
        return rope["full_attention"], rope.get("sliding_attention")
    return rope, None


def original_length(config: PretrainedConfig, full: Mapping[str, Any]) -> int:
    """Context length before the scaling."""
    length = full.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(length or config.max_position_embeddings)


def check_rope(config: PretrainedConfig, facts: Gguf) -> str | None:
    """Why the config's RoPE cannot be written, or None."""
    full, local = parameters(config)
    scaling = full.get("rope_type", "default")
    if scaling not in facts.rope_types:
        return f"llama.cpp has no RoPE scaling '{scaling}' for {facts.arch}"
    if local is not None and local.get("rope_type", "default") != "default":
        return "llama.cpp scales RoPE in layers with full attention only"
    if scaling == "yarn" and not full.get("truncate", True):
        return "llama.cpp has only the YaRN that rounds its range of corrections (`truncate`)"
    return None


def _yarn(config: PretrainedConfig, full: Mapping[str, Any]) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "rope.scaling.yarn_beta_fast": float(full.get("beta_fast") or 32.0),
        "rope.scaling.yarn_beta_slow": float(full.get("beta_slow") or 1.0),
    }
    # llama.cpp scales by 1 + 0.1 ln(factor) of its own (arXiv 2309.00071, section 3.4); this is what comes on top.
    rest = _attention_factor(config) / (1 + 0.1 * math.log(full["factor"]))
    if abs(rest - 1) > 1e-6:
        keys["rope.scaling.attn_factor"] = rest
    return keys


def _attention_factor(config: PretrainedConfig) -> float:
    """What transformers multiplies the rotation by."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    full, _ = parameters(config)
    return float(ROPE_INIT_FUNCTIONS[full["rope_type"]](config, torch.device("cpu"))[1])
