"""A quantized export: written, read back by transformers, and held against the bound of its format."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import Artifact, Checkpoint
from ftcore.weights import Weight, Weights
from ftcore_exporters._compressed import Format, write
from ftcore_exporters._linear_layers import Layers
from ftcore_exporters._read_back import careful

if TYPE_CHECKING:
    import torch

MANTISSA = 2.0**-4
"""Relative error of rounding to float8_e4m3fn, which has 3 bits of mantissa."""
SUBNORMAL = 2.0**-10
"""Its largest error near 0, in scales: half the distance of its smallest numbers."""
STEP = 0.5
"""Largest error of rounding to the nearest integer, in scales."""


def export(
    checkpoint: Checkpoint, target: str, form: Format, layers: Layers, weights: Weights, note: str, verify: bool
) -> Artifact:
    """Write `export/<target>` and read it back.

    Raises Refused when the disk has no room for it.
    """
    folder = checkpoint.plan.output_dir / "export" / target
    write(checkpoint, folder, form, layers, weights)
    unpacked = 4 * sum(math.prod(weight.shape) for weight in weights.values())
    read = functools.partial(read_back, checkpoint, folder, form, layers, weights)
    checks = careful(checkpoint, "transformers", unpacked, read) if verify else {}
    return Artifact.of(target, folder, f"{note}; for vLLM and transformers", checks)


def read_back(checkpoint: Checkpoint, folder: Path, form: Format, layers: Layers, weights: Weights) -> dict[str, Any]:
    """Load the folder with transformers, unpacked on the CPU, and compare its weights and logits.

    `weights_within` is the bound for one weight, `max_weight_error` the largest error in parts of it: 1 and below is
    what the format promises, the rounding of what is unpacked to the type of the scales allowed for.
    """
    import transformers
    from transformers import CompressedTensorsConfig

    from ftcore.agreement import REPORTED
    from ftcore.merge import model_weights
    from ftcore_exporters._engine import PACKED, by_vllm
    from ftcore_exporters._read_back import compared, joined

    loader = getattr(transformers, checkpoint.plan.family.auto_class)
    with warnings.catch_warnings():
        # transformers takes all of the config but `dequantize` from the folder, as is meant here, and says so.
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        unpack = CompressedTensorsConfig(dequantize=True)
        model = loader.from_pretrained(
            folder, dtype="float32", quantization_config=unpack, trust_remote_code=False
        ).eval()
    error = largest_error(folder, form, layers, weights, model_weights(model))
    bound = "2^-4 of it, or 2^-10 of its row's scale" if form.group_size is None else "half a step of its group's scale"
    objection = None if error <= 1 else f"a weight is off by {error:.3g} times what the format allows"
    found = {
        **joined(compared(checkpoint, model, folder, "transformers", within=REPORTED), objection),
        "weights_within": bound,
        "max_weight_error": error,
    }
    return {**found, "vllm": by_vllm(checkpoint, folder, model, PACKED)}


def largest_error(folder: Path, form: Format, layers: Layers, weights: Weights, loaded: Weights) -> float:
    """The largest error of a weight, in parts of what the format allows for it."""
    from ftcore.safetensors_file import checkpoint_files, read_weights

    stored = {name: weight for file in checkpoint_files(folder) for name, weight in read_weights(file).items()}
    worst = 0.0
    for name in layers.quantized:
        scale = stored[f"{name}.weight_scale"]
        error = _layer_error(weights[f"{name}.weight"], loaded[f"{name}.weight"], scale, form.group_size)
        worst = max(worst, error)
    return worst


def _layer_error(weight: Weight, loaded: Weight, scale: Weight, group_size: int | None) -> float:
    import torch

    if weight.shape != loaded.shape:
        return math.inf
    # compressed-tensors unpacks to the type of the scales.
    half_ulp = torch.finfo(scale.dtype).eps / 2
    worst, step = 0.0, max(1, 2**22 // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        stop = min(start + step, weight.shape[0])
        exact, found = weight.rows(start, stop).float(), loaded.rows(start, stop).float()
        scales = scale.rows(start, stop).float()
        steps = scales.repeat_interleave(group_size or weight.shape[1], dim=1)
        allowed = _allowed(exact, steps, group_size) + found.abs() * half_ulp
        worst = max(worst, float(((found - exact).abs() / allowed).max()))
    return worst


def _allowed(exact: torch.Tensor, steps: torch.Tensor, group_size: int | None) -> torch.Tensor:
    """The format's own error bound for each weight."""
    if group_size is not None:
        return steps * STEP
    return (exact.abs() * MANTISSA).maximum(steps * SUBNORMAL)
