"""One model out of base and adapter, in 16 bits: the adapter is added in float32 and rounded once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.errors import Problem, Refused
from ftcore.paths import whole_folder

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

QUANTIZED = ("Linear4bit", "Linear8bitLt", "Fp8Linear")
"""Layers of bitsandbytes and of `+quantizer=fp8`, whose weights are unpacked for a merged model."""


def write_merged(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str = "auto") -> Path:
    """Write the merged model as a transformers checkpoint folder; the model itself is not changed.

    `dtype` is `float16`, `bfloat16`, `float32`, or `auto`: the model's own if it has 16 bits; else float16, whose 10
    bits of mantissa stay closer to float32 than bfloat16's 7, unless a weight is too large for it.
    """
    import torch
    from huggingface_hub import save_torch_state_dict
    from transformers.core_model_loading import revert_weight_conversion

    base: Any = getattr(model, "get_base_model", lambda: model)()
    weights = merged_weights(base)
    target = getattr(torch, dtype) if dtype != "auto" else _sixteen_bits(weights)
    config = copy.deepcopy(base.config)
    tied = _still_tied(base, weights)
    _ties(config).tie_word_embeddings = bool(tied)
    config.dtype, config.use_cache = target, True
    config.architectures = [type(base).__name__]  # with the head that was trained, which may be another than before
    config.get_text_config().use_cache = True
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    exact = tuple(getattr(base, "_keep_in_fp32_modules_strict", None) or ())  # by which routers decide, for one
    state = {
        n: (w if any(name in n for name in exact) else w.to(target)).cpu() for n, w in weights.items() if n not in tied
    }
    # Under the names of the published checkpoints: experts one by one, as everything but transformers reads them.
    state = {n: _whole(w) for n, w in revert_weight_conversion(base, state).items()}
    with whole_folder(folder) as work:
        config.save_pretrained(work)
        if getattr(base, "generation_config", None) is not None:  # encoders have none
            base.generation_config.save_pretrained(work)
        tokenizer.save_pretrained(work)
        save_torch_state_dict(state, work, max_shard_size="5GB")
    return folder


def _whole(weight: torch.Tensor) -> torch.Tensor:
    """The weight in memory of its own: safetensors takes no part of another tensor, such as one expert of many."""
    weight = weight.contiguous()
    return weight if weight.untyped_storage().nbytes() == weight.nbytes else weight.clone()


def _ties(config: Any) -> Any:
    """The config that says whether head and embedding are one: the whole model's, or that of its text part."""
    return config if hasattr(config, "tie_word_embeddings") else config.get_text_config()


def _still_tied(base: Any, weights: dict[str, torch.Tensor]) -> set[str]:
    """Names that the checkpoint leaves out because they equal the input embedding.

    A tied model of which only the head, or only the embedding, was trained is tied no longer.
    """
    if not _ties(base.config).tie_word_embeddings:
        return set()
    names = set(getattr(base, "_tied_weights_keys", None) or ()) & set(weights)
    source = next((w for n, w in weights.items() if n.endswith("embed_tokens.weight")), None)
    if source is None or all(weights[n].shape == source.shape and bool((weights[n] == source).all()) for n in names):
        return names
    return set()


def merged_weights(base: nn.Module) -> dict[str, torch.Tensor]:
    """Parameter and persistent buffer names of the plain model to merged values; changed ones are float32."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    special = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or type(module).__name__ in QUANTIZED
    }
    weights = {
        name: value
        for name, value in base.state_dict().items()
        if not any(name.startswith(f"{path}.") for path in special)
    }
    for path, module in special.items():
        if any(path.startswith(f"{outer}.") for outer in special):
            continue  # the layer inside an adapter is merged with it
        weights |= {f"{path}.{name}": value for name, value in _merged_module(path, module).items()}
    return weights


def _merged_module(path: str, module: Any) -> dict[str, torch.Tensor]:
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        if type(module).__name__ in QUANTIZED:
            return _with_bias({"weight": _unpacked(module)}, module)
        if hasattr(module, "token_adapter"):  # some rows of it were trained, those of new tokens
            rows = module.token_adapter
            return _with_bias(
                {"weight": rows.get_merged_weights(rows.active_adapters).detach()}, module.original_module
            )
        return dict(module.modules_to_save[module.active_adapters[0]].state_dict())  # the trained copy
    layer = module.get_base_layer()
    if type(layer).__name__ in QUANTIZED:
        if any(getattr(module, "use_dora", {}).values()):
            raise Refused(
                Problem(
                    "export",
                    f"DoRA over quantized weights cannot be merged exactly ({path})",
                    "export the adapter, or train over 16-bit weights",
                )
            )
        delta = sum(module.get_delta_weight(name).detach() for name in module.active_adapters)
        return _with_bias({"weight": _unpacked(layer) + delta.float()}, layer)
    # One layer at a time in float32, merged by PEFT itself, so that every variant (rsLoRA, DoRA, ...) is exact.
    single = copy.deepcopy(module).float()
    with torch.no_grad():
        while isinstance(single, BaseTunerLayer):  # adapters of a module's parameters stand inside each other
            single.merge(safe_merge=True)
            single = single.base_layer
    return dict(single.state_dict())


def _unpacked(layer: Any) -> torch.Tensor:
    """A quantized weight in float32."""
    if type(layer).__name__ == "Fp8Linear":
        values: torch.Tensor = layer.dequantize()
        return values
    from bitsandbytes.functional import dequantize_4bit

    if type(layer).__name__ == "Linear4bit":
        weight: torch.Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight.float()
    # One scale per row: int8 127 stands for the row's largest value.
    scale = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    rows: torch.Tensor = layer.weight.data.float() * (scale.float() / 127).unsqueeze(1)
    return rows


def _with_bias(weights: dict[str, torch.Tensor], layer: Any) -> dict[str, torch.Tensor]:
    bias = getattr(layer, "bias", None)
    return weights if bias is None else {**weights, "bias": bias.detach()}


def _sixteen_bits(weights: dict[str, torch.Tensor]) -> torch.dtype:
    import torch

    kinds = [w.dtype for w in weights.values() if w.is_floating_point()]
    for kind in (torch.bfloat16, torch.float16):
        if kind in kinds:
            return kind
    largest = max(float(w.abs().max()) for w in weights.values() if w.is_floating_point() and w.numel())
    return torch.float16 if largest < torch.finfo(torch.float16).max else torch.bfloat16
