"""The weights of the decoder layers, prepared for writing completions.

LoRA's factors are rounded and put in their places once for all steps. Weights in 4 bits are unpacked for the time
being, or the products of a step read them packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ftcore_kernels.decoding.layers import Place, op
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.fp8 import fp8_whole
from ftcore_kernels.layers.decoder.linear import Fused
from ftcore_kernels.layers.decoder.packing import pack
from ftcore_kernels.layers.decoder.sources import Source, is_fp8, is_nf4, packed
from ftcore_kernels.layers.decoder.stack import Stack
from ftcore_kernels.reference.nf4_rows import fits

PREFERRED = "unpacked"
"""What 4-bit weights are while completions are written: `unpacked` where there is room, or `packed` all the time.

Both read a weight once a step: unpacked ones take 16 bits and no arithmetic, packed ones a quarter and 5 instructions.
An 8B model's products of 16 rows take 3.9 ms unpacked on an H200, 4.4 packed, and 10.9 if every step dequantizes them.
"""
FEW_ROWS = 64
"""Rows up to which a product reads packed weights; for more, such as prompts, it dequantizes them."""
OWN_FP8 = True
"""Whether few rows have a kernel of their own for float8 weights too; `fp8_mm` computes 272 rows at least.

An 8B model's products of 16 rows take 2.7 ms by it on an H200, and 8.1 ms by `fp8_mm` (`tests/bench/few_rows.py`).
"""


def prepare(places: list[Place], dtype: torch.dtype, room: int, rows: int = FEW_ROWS) -> None:
    """Put LoRA's factors in place; unpack 4-bit weights, or see that few rows are multiplied with them as they are.

    :param room: Bytes that unpacked weights may take. Where they do not fit, they stay packed.
    :param rows: Completions at a time, at most. More than `FEW_ROWS` unpack where there is room, whatever is preferred.
    """
    in_4_bits = [fused for place in places for fused in place.layer.fused if is_nf4(fused.sources[0].base)]
    size = sum((f.width + f.border) * f.inputs for f in in_4_bits) * dtype.itemsize
    if in_4_bits and size <= room and (PREFERRED == "unpacked" or rows > FEW_ROWS):
        for place in places:
            for name, fused in zip(place.products, place.layer.fused, strict=True):
                if is_nf4(fused.sources[0].base):
                    setattr(place.layer, name, _unpacked(fused, place.layer.ops, dtype))
    else:
        for fused in in_4_bits:
            _read_packed(fused)
    if OWN_FP8:
        for fused in (fused for place in places for fused in place.layer.fused if is_fp8(fused.sources[0].base)):
            _read_fp8(fused)
    pack([fused for place in places for fused in place.layer.fused], dtype)


def _read_packed(fused: Fused) -> None:
    """Let few rows be multiplied with the weights as they lie."""
    weights = [packed(source.base) for source in fused.sources]
    device = weights[0].packed.device
    if fits(weights) and _at_least((8, 0), device):  # before, the kernel's registers do not suffice
        nf4_rows = op("nf4_rows", device)
        fused.few = lambda x: nf4_rows(x, weights, fused.a) if x.shape[0] <= FEW_ROWS else None


def _read_fp8(fused: Fused) -> None:
    """The same for float8 weights that lie side by side, where the GPU multiplies them."""
    bases: Any = [source.base for source in fused.sources]
    whole, device = fp8_whole(bases), bases[0].weight.device
    if whole is not None and _at_least((8, 9), device):
        fp8_rows, weight, scale = op("fp8_rows", device), whole.weight, whole.scale
        fused.few = lambda x: fp8_rows(x, weight, scale, fused.a) if x.shape[0] <= FEW_ROWS else None


def _at_least(capability: tuple[int, int], device: torch.device) -> bool:
    """Whether a GPU is that new; a CPU has the plain twins."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= capability


def _unpacked(fused: Fused, ops: Any, dtype: torch.dtype) -> Fused:
    """The same product over plain weights, behind each other in memory."""
    whole = Dense(ops).whole(fused, dtype)
    assert whole is not None
    whole[fused.width :] = 0
    sources = []
    for source, rows in zip(fused.sources, fused.columns, strict=True):
        base: Any = nn.Linear(fused.inputs, whole[rows].shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(whole[rows], requires_grad=False)
        base.bias = source.base.bias
        sources.append(Source(base, source.a, source.b, source.scale))
    return Fused(sources, Stack(whole, fused.width))
