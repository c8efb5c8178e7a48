"""Merged weights in the compressed-tensors format, quantized one layer at a time.

The format is that of https://github.com/vllm-project/compressed-tensors, whose own classes describe, round and pack
here. Scales come from the largest weight of each row or group alone, and weights are rounded to the nearest value: no
sample is run through the model (round-to-nearest, without calibration).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import Checkpoint
from ftcore.disk import need_space
from ftcore.merge import sixteen_bits
from ftcore.paths import whole_folder
from ftcore.safetensors_file import Entry, write_checkpoint
from ftcore.weights import Weight, Weights
from ftcore_exporters._linear_layers import Layers

if TYPE_CHECKING:
    import torch

SHARD = 5 * 10**9
"""Bytes of one safetensors file."""
VALUES = 16 * 2**20
"""Values that are quantized at once."""


@dataclass(frozen=True)
class Format:
    """One way of the package to quantize linear layers."""

    preset: str
    """The package's name of the scheme, such as `W4A16`."""
    format: str
    """Its name of what is written, such as `pack-quantized`."""
    group_size: int | None = None
    """Weights of a row that share a scale, of the model's 16-bit type; None for a scale per row, in float32, as vLLM
    keeps them."""

    def scheme(self) -> Any:
        """The package's `QuantizationScheme` for all linear layers."""
        from compressed_tensors.quantization import preset_name_to_scheme

        scheme = preset_name_to_scheme(self.preset, ["Linear"])
        if self.group_size is not None:
            scheme.weights.group_size = self.group_size
        scheme.format = self.format
        return scheme


def write(checkpoint: Checkpoint, target: Path, form: Format, layers: Layers, weights: Weights) -> None:
    """Write the quantized model as a transformers folder.

    :param weights: `checkpoint.weights()`.

    Raises Refused when the disk has no room for it.
    """
    from ftcore_exporters._serving import generation_settings

    dtype = sixteen_bits(weights)
    entries = _entries(weights, layers, form.scheme(), dtype)
    need_space(target, sum(math.prod(shape) * kind.itemsize for _, shape, kind, _ in entries), "the quantized model")
    config = checkpoint.config()
    config.dtype, config.use_cache = dtype, True
    config.get_text_config().use_cache = True
    config.quantization_config = described(form, layers.left)
    with whole_folder(target) as work:
        config.save_pretrained(work)
        checkpoint.tokenizer.save_pretrained(work)
        generation_settings(checkpoint).save_pretrained(work)
        write_checkpoint(work, entries, SHARD)


def described(form: Format, ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json."""
    import compressed_tensors
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    config = QuantizationConfig(
        config_groups={"group_0": form.scheme()},
        format=form.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    written: dict[str, Any] = config.model_dump(mode="json")
    return {**written, "version": compressed_tensors.__version__}


def _entries(weights: Weights, layers: Layers, scheme: Any, dtype: torch.dtype) -> list[Entry]:
    """What is written for every weight: the tensors that it is packed into, or itself."""

    import torch

    scales = dtype if scheme.weights.group_size else torch.float32

    @functools.lru_cache(maxsize=1)  # the tensors of one layer are written one after the other
    def packed(name: str) -> Mapping[str, torch.Tensor]:
        return compressed(weights[f"{name}.weight"], scheme, scales)

    quantized, entries = set(layers.quantized), list[Entry]()
    for name, weight in weights.items():
        base = name.removesuffix(".weight")
        if base not in quantized:
            kept = weight.exact or not weight.dtype.is_floating_point
            entries.append((name, weight.shape, weight.dtype if kept else dtype, weight.chunks))
            continue
        for part, like in _shapes(weight.shape, scheme, scales).items():
            rows = functools.partial(_part, packed, base, part)
            entries.append((f"{base}.{part}", tuple(like.shape), like.dtype, rows))
    return entries


def _part(packed: Any, name: str, part: str) -> Iterator[torch.Tensor]:
    yield packed(name)[part]


def _shapes(shape: Sequence[int], scheme: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a layer becomes, without values.

    :param dtype: of the scales.
    """
    import torch

    rows, columns = shape
    groups = columns // scheme.weights.group_size if scheme.weights.group_size else 1
    made = {"weight_scale": torch.empty((rows, groups), dtype=dtype, device="meta")}
    if scheme.weights.num_bits == 8:
        return {"weight": torch.empty(tuple(shape), dtype=torch.float8_e4m3fn, device="meta"), **made}
    words = math.ceil(columns * scheme.weights.num_bits / 32)
    made["weight_packed"] = torch.empty((rows, words), dtype=torch.int32, device="meta")
    made["weight_shape"] = torch.empty(2, dtype=torch.int64, device="meta")
    if not scheme.weights.symmetric:
        words = math.ceil(rows * scheme.weights.num_bits / 32)
        made["weight_zero_point"] = torch.empty((words, groups), dtype=torch.int32, device="meta")
    return made


def compressed(weight: Weight, scheme: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One layer's tensors as the package packs them.

    :param weight: `[outputs, inputs]`.
    :param dtype: of the scales.
    """
    import torch
    from compressed_tensors.compressors import BaseCompressor

    packer = BaseCompressor.get_value_from_registry(scheme.format)
    # Zero points of 32 rows fill whole words.
    step = max(32, VALUES // weight.shape[1] // 32 * 32)
    pieces = []
    for start in range(0, weight.shape[0], step):
        rows = weight.rows(start, min(start + step, weight.shape[0])).float()
        scale, zero = scales(rows, scheme.weights, dtype)
        pieces.append(packer.compress({"weight": rows, "weight_scale": scale, "weight_zero_point": zero}, scheme))
    made = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0] if name != "weight_shape"}
    if "weight_shape" in pieces[0]:
        made["weight_shape"] = torch.tensor(weight.shape)
    return made


def scales(rows: torch.Tensor, arguments: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales `[rows, groups]` in `dtype`, and zero points of the same shape.

    A scale is rounded up, so that no weight lies outside what its row or group can express, and the error of every
    weight stays within half a step of the scale that is written.
    """
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams, calculate_range

    grouped = rows.unflatten(-1, (-1, arguments.group_size or rows.shape[-1]))
    least, most = grouped.amin(-1), grouped.amax(-1)
    exact, zero = calculate_qparams(least, most, arguments)
    scale = exact.to(dtype)
    low = scale.float() < exact
    scale[low] = (exact[low] * (1 + torch.finfo(dtype).eps)).to(dtype)
    scale = scale.clamp_min(torch.finfo(dtype).tiny)
    if not arguments.symmetric:  # by the scale that is written, not by the exact one
        first, last = (float(bound) for bound in calculate_range(arguments, rows.device))
        zero = (first - least.clamp_max(0) / scale.float()).round().clamp(first, last).to(zero.dtype)
    return scale, zero
