"""One model out of base and adapter, in 16 bits: the adapter is added in float32 and rounded once."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore.disk import need_space
from ftcore.errors import Problem, Refused
from ftcore.paths import whole_folder
from ftcore.published_names import published
from ftcore.safetensors_file import Entry, write_checkpoint
from ftcore.weights import Weight, Weights

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

QUANTIZED = ("Linear4bit", "Linear8bitLt", "Fp8Linear")
"""Layers of bitsandbytes and of `+quantizer=fp8`, whose weights are unpacked for a merged model."""
SHARD = 5 * 10**9
"""Bytes of one safetensors file, transformers' own default being 50 GB and the hub's advice 5 GB."""


def write_merged(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str = "auto") -> Path:
    """Write the merged model as a transformers checkpoint folder; the model itself is not changed.

    `dtype` is `float16`, `bfloat16`, `float32`, or `auto`: the model's own if it has 16 bits; else float16, whose 10
    bits of mantissa stay closer to float32 than bfloat16's 7, unless a weight is too large for it.

    Raises Refused when the disk has no room for it.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    generation = getattr(base, "generation_config", None)  # encoders have none
    return write_weights(model_weights(base), model_config(base), tokenizer, folder, dtype, generation=generation)


def write_weights(
    weights: Weights,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: str = "auto",
    shard_size: int = SHARD,
    generation: Any = None,
) -> Path:
    """Write merged weights as a transformers checkpoint folder, a chunk of rows at a time.

    :param weights: `Checkpoint.weights()`.
    :param dtype: as `write_merged` takes it.
    :param shard_size: bytes of one safetensors file.

    Raises Refused when the disk has no room for it.
    """
    import torch

    target = getattr(torch, dtype) if dtype != "auto" else sixteen_bits(weights)
    config = copy.deepcopy(config)
    config.dtype, config.use_cache = target, True
    config.get_text_config().use_cache = True
    entries: list[Entry] = []
    for name, weight in weights.items():
        kept = weight.exact or not weight.dtype.is_floating_point
        entries.append((name, weight.shape, weight.dtype if kept else target, weight.chunks))
    need_space(folder, sum(math.prod(shape) * dtype.itemsize for _, shape, dtype, _ in entries), "the merged model")
    with whole_folder(folder) as work:
        config.save_pretrained(work)
        if generation is not None:
            generation.save_pretrained(work)
        tokenizer.save_pretrained(work)
        write_checkpoint(work, entries, shard_size)
    return folder


def model_config(base: Any) -> PretrainedConfig:
    """The config of the merged model: of the class with the head that was trained, without a quantization."""
    config: PretrainedConfig = copy.deepcopy(base.config)
    ties(config).tie_word_embeddings = ties(config).tie_word_embeddings and still_tied(base)
    config.architectures = [type(base).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def ties(config: Any) -> Any:
    """The config that says whether head and embedding are one: the whole model's, or that of its text part."""
    return config if hasattr(config, "tie_word_embeddings") else config.get_text_config()


def still_tied(base: Any) -> bool:
    """Whether head and embedding, tied in the base, are equal once merged.

    A tied model of which only the head, or only the embedding, was trained is tied no longer.
    """
    import torch

    weights = _own_weights(base)
    names, source = _tied_names(base, weights)
    if source is None or not any(_within(name, _special(base)) for name in (*names, source)):
        return True
    first = weights[source]
    return all(
        weights[name].shape == first.shape
        and all(torch.equal(a, b) for a, b in zip(weights[name].chunks(), first.chunks(), strict=True))
        for name in names
    )


def _tied_names(base: Any, weights: Mapping[str, Weight]) -> tuple[set[str], str | None]:
    """Names that repeat the input embedding in a tied model, and the embedding's own."""
    names = set(getattr(base, "_tied_weights_keys", None) or ()) & set(weights)
    return names, next((n for n in weights if n.endswith("embed_tokens.weight")), None)


def model_weights(base: Any) -> Weights:
    """The merged weights of a loaded model under their published names; each is merged when it is read.

    :param base: the transformers model under the adapter. Where head and embedding are tied and still equal, only the
        embedding is given.
    """
    weights = _own_weights(base)
    if ties(base.config).tie_word_embeddings and still_tied(base):
        tied, _ = _tied_names(base, weights)
        weights = {name: weight for name, weight in weights.items() if name not in tied}
    # Under the names of the published checkpoints: experts one by one, as everything but transformers reads them.
    return published(base, weights)


def merged_weights(base: nn.Module) -> dict[str, torch.Tensor]:
    """Parameter and persistent buffer names of the plain model to merged values; changed ones are float32.

    All of them at once: `model_weights` gives them one by one.
    """
    return {name: weight.whole() for name, weight in _own_weights(base).items()}


def _special(base: nn.Module) -> dict[str, Any]:
    """Paths of the modules whose weights are not simply there: with an adapter, trained copies, quantized."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) or type(module).__name__ in QUANTIZED
    }


def _within(name: str, paths: Mapping[str, Any]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _own_weights(base: nn.Module) -> dict[str, Weight]:
    """The merged weights under the loaded model's own names."""
    special = _special(base)
    strict = tuple(getattr(base, "_keep_in_fp32_modules_strict", None) or ())

    def weight(name: str, shape: tuple[int, ...], dtype: torch.dtype, value: Callable[[], torch.Tensor]) -> Weight:
        def read(start: int, stop: int) -> torch.Tensor:
            whole = value().detach()
            return (whole[start:stop] if whole.dim() else whole).cpu()

        return Weight(shape, dtype, read, exact=any(part in name for part in strict))

    @functools.lru_cache(maxsize=1)  # all weights of a module in turn, and no second module's
    def merged(path: str) -> Mapping[str, torch.Tensor]:
        return _merged_module(path, special[path])

    weights = {
        name: weight(name, tuple(value.shape), value.dtype, functools.partial(_same, value))
        for name, value in base.state_dict().items()
        if not _within(name, special)
    }
    for path, module in special.items():
        if not _within(path, special):  # else it is merged with the adapter around it
            for name, (shape, dtype) in _shapes(module).items():
                whole = f"{path}.{name}"
                weights[whole] = weight(whole, shape, dtype, functools.partial(_picked, merged, path, name))
    return weights


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _picked(merged: Callable[[str], Mapping[str, torch.Tensor]], path: str, name: str) -> torch.Tensor:
    return merged(path)[name]


def _shapes(module: Any) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names in the plain module to shape and type, known without merging."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = module
    while isinstance(plain, BaseTunerLayer):
        plain = plain.base_layer
    if hasattr(plain, "token_adapter"):
        plain = plain.original_module
    elif hasattr(plain, "modules_to_save"):
        plain = plain.modules_to_save[plain.active_adapters[0]]
    if type(plain).__name__ not in QUANTIZED:
        return {name: (tuple(value.shape), value.dtype) for name, value in plain.state_dict().items()}
    dtype: torch.dtype = getattr(plain, "compute_dtype", None) or torch.float32
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "weight": ((plain.out_features, plain.in_features), dtype)
    }
    return shapes if plain.bias is None else {**shapes, "bias": (tuple(plain.bias.shape), plain.bias.dtype)}


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


def sixteen_bits(weights: Weights) -> torch.dtype:
    """The 16-bit type for these weights: the one that they have, else float16 where every value fits, else bfloat16."""
    import torch

    floats = [w for w in weights.values() if w.dtype.is_floating_point]
    for kind in (torch.bfloat16, torch.float16):
        if any(w.dtype == kind for w in floats):
            return kind
    limit = torch.finfo(torch.float16).max
    fits = all(float(chunk.abs().max()) < limit for w in floats for chunk in w.chunks() if chunk.numel())
    return torch.float16 if fits else torch.bfloat16
