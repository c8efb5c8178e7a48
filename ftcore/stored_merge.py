"""Base and adapter merged from their files: a chunk of rows at a time, and no model is loaded.

What cannot be told from the files alone is left to `ftcore.merge`, which merges a loaded model.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.merge import ties
from ftcore.safetensors_file import checkpoint_files, read_weights
from ftcore.weights import Weight, Weights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

PREFIX = "base_model.model."
"""What PEFT writes in front of the base model's names."""
ADAPTER = "adapter_model.safetensors"
STARTS = (True, False, "gaussian", "orthogonal", None)
"""`init_lora_weights` that leave the base's weights as they are (PEFT's `LoraConfig`)."""
COMPUTED = "rotary_emb.inv_freq"
"""End of names in older checkpoints of what models compute now, and load no longer."""


def stored(base: Path, adapter: Path | None, config: PretrainedConfig) -> Weights | str:
    """The merged weights of a transformers checkpoint and a LoRA adapter, both in folders; or why files do not do.

    :param config: the merged model's; a head or embedding that it ties is left out.

    Raises Refused when a file is damaged.
    """
    files = checkpoint_files(base)
    if not files:
        return "the base is not stored as safetensors"
    if getattr(config, "quantization_config", None):
        return "the base is stored quantized"
    weights = {name: weight for file in files for name, weight in read_weights(file).items()}
    for name in _never_loaded(weights, config):
        del weights[name]
    strict = _kept_exact(config)
    weights = {n: Weight(w.shape, w.dtype, w.read, any(part in n for part in strict)) for n, w in weights.items()}
    if adapter is not None:
        merged = _with_adapter(weights, adapter)
        if isinstance(merged, str):
            return merged
        weights = merged
    return _without_ties(weights, config)


def _kept_exact(config: PretrainedConfig) -> tuple[str, ...]:
    """Parts of names of what the model keeps in float32, as its class says."""
    return tuple(getattr(_class(config), "_keep_in_fp32_modules_strict", None) or ())


def _class(config: PretrainedConfig) -> Any:
    import transformers

    return getattr(transformers, (config.architectures or [""])[0], None)


def _never_loaded(names: Iterable[str], config: PretrainedConfig) -> set[str]:
    """What checkpoints hold and the model's class leaves out when it loads them, as layers that guess further tokens.

    Consumers that know each tensor, as llama.cpp, load no file that has more than the model.
    """
    cls = _class(config)
    patterns = getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    return {name for name in names if name.endswith(COMPUTED)} | (found - _own_names(cls, config) if found else set())


def _own_names(cls: Any, config: PretrainedConfig) -> set[str]:
    """Published names of the class's weights: its patterns match some of them too, and mean only what is none."""
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = cls(config)
    return set(revert_weight_conversion(model, model.state_dict()))


def _without_ties(weights: dict[str, Weight], config: Any) -> dict[str, Weight]:
    """Old checkpoints hold the head as well as the embedding that it is."""
    if ties(config).tie_word_embeddings:
        return {name: weight for name, weight in weights.items() if not name.endswith("lm_head.weight")}
    return weights


def _with_adapter(weights: dict[str, Weight], adapter: Path) -> dict[str, Weight] | str:
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    for key, plain in (
        ("use_dora", False),
        ("fan_in_fan_out", False),
        ("target_parameters", None),
        ("trainable_token_indices", None),
        ("layer_replication", None),
        ("bias", "none"),
        ("modules_to_save", None),
        ("lora_bias", False),
    ):
        if (settings.get(key) or plain) != plain:
            return f"the adapter has {key}"
    if settings.get("peft_type") != "LORA" or settings.get("init_lora_weights", True) not in STARTS:
        return "the adapter is no plain LoRA"
    parts = read_weights(adapter / ADAPTER)
    merged, used = dict(weights), set()

    @functools.lru_cache(maxsize=1)  # of one weight at a time: of all of them, they would fill memory
    def right(name: str) -> torch.Tensor:
        return parts[name].whole().float()

    for name in weights:
        path = f"{PREFIX}{name.removesuffix('.weight')}"
        down, up = parts.get(f"{path}.lora_A.weight"), parts.get(f"{path}.lora_B.weight")
        if down is not None and up is not None and name.endswith(".weight"):
            factor = scale(settings, path.removeprefix(PREFIX), down.shape[0])
            merged[name] = _added(weights[name], functools.partial(right, f"{path}.lora_A.weight"), up, factor)
            used |= {f"{path}.lora_A.weight", f"{path}.lora_B.weight"}
    if left := sorted(set(parts) - used):
        return f"{left[0]} belongs to no weight of the checkpoint by its name"
    return merged


def scale(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """LoRA's alpha / r, and rsLoRA's alpha / sqrt(r) (arXiv 2312.03732), for one module.

    :param settings: an adapter's `adapter_config.json`.
    """
    from peft.utils.other import get_pattern_key

    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), path), settings["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _added(weight: Weight, right: Callable[[], torch.Tensor], up: Weight, factor: float) -> Weight:
    """W + factor B A, `[out, in]`, in float32; `right` gives A, `[r, in]`."""

    def read(start: int, stop: int) -> torch.Tensor:
        import torch

        rows: torch.Tensor = weight.read(start, stop).float()
        return torch.addmm(rows, up.read(start, stop).float(), right(), alpha=factor)

    return Weight(weight.shape, weight.dtype, read, weight.exact)
