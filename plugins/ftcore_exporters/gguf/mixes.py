"""Which tensor gets which type: llama.cpp's mixes, as its own quantizer picks them (`src/llama-quant.cpp`).

Checked tensor by tensor against `llama_model_quantize` of build b10434.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Type

FILE_TYPES = {
    "f32": (LlamaFileType.ALL_F32, Type.F32),
    "f16": (LlamaFileType.MOSTLY_F16, Type.F16),
    "bf16": (LlamaFileType.MOSTLY_BF16, Type.BF16),
    "q8_0": (LlamaFileType.MOSTLY_Q8_0, Type.Q8_0),
    "q4_0": (LlamaFileType.MOSTLY_Q4_0, Type.Q4_0),
    "q4_1": (LlamaFileType.MOSTLY_Q4_1, Type.Q4_1),
    "q5_0": (LlamaFileType.MOSTLY_Q5_0, Type.Q5_0),
    "q5_1": (LlamaFileType.MOSTLY_Q5_1, Type.Q5_1),
    "q2_k": (LlamaFileType.MOSTLY_Q2_K, Type.Q2_K),
    "q3_k_s": (LlamaFileType.MOSTLY_Q3_K_S, Type.Q3_K),
    "q3_k_m": (LlamaFileType.MOSTLY_Q3_K_M, Type.Q3_K),
    "q3_k_l": (LlamaFileType.MOSTLY_Q3_K_L, Type.Q3_K),
    "q4_k_s": (LlamaFileType.MOSTLY_Q4_K_S, Type.Q4_K),
    "q4_k_m": (LlamaFileType.MOSTLY_Q4_K_M, Type.Q4_K),
    "q5_k_s": (LlamaFileType.MOSTLY_Q5_K_S, Type.Q5_K),
    "q5_k_m": (LlamaFileType.MOSTLY_Q5_K_M, Type.Q5_K),
    "q6_k": (LlamaFileType.MOSTLY_Q6_K, Type.Q6_K),
}
"""Name to `general.file_type` and the type of most tensors."""

PLAIN = frozenset({Type.F32, Type.F16, Type.BF16})
# Where a row does not divide into the blocks of 256 of the type on the left.
FALLBACK = {
    Type.Q2_K: Type.Q4_0,
    Type.Q3_K: Type.Q4_0,
    Type.Q4_K: Type.Q5_0,
    Type.Q5_K: Type.Q5_1,
    Type.Q6_K: Type.Q8_0,
}
# Small tensors that decide much: kept in float32.
KEPT = re.compile(r"_norm\.weight|ffn_gate_inp\.weight|shortconv\.conv\.weight")
SEVENTY_B = frozenset({("llama", 80), ("qwen2", 80)})
"""Architectures and numbers of layers that llama.cpp takes for a model of 70B, whose values are shared by 8 heads."""


@dataclass(frozen=True)
class Model:
    """What the choice depends on besides names and shapes."""

    arch: str
    layers: int
    experts: int
    """Per layer; 0 where there are none."""
    sharing: int
    """Query heads for each key and value head in the first layer; 0 where that has no attention."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands among those of its kind."""

    index: int
    count: int
    model: Model

    @property
    def more_bits(self) -> bool:
        """The first and last eighth, and every third in between."""
        eighth = self.count // 8
        return self.index < eighth or self.index >= 7 * self.count // 8 or (self.index - eighth) % 3 == 2


Choice = Callable[[_Place], Type | None]


def _more_bits(place: _Place) -> Type | None:
    return Type.Q6_K if place.more_bits else None


def _first(part: int, chosen: Type, other: Type | None = None) -> Choice:
    return lambda place: chosen if place.index < place.count // part else other


VALUES: Mapping[str, Choice] = {
    "q2_k": lambda place: Type.Q4_K if place.model.sharing >= 4 else Type.Q3_K,
    "q3_k_m": lambda place: Type.Q5_K if place.index < 2 else Type.Q4_K,
    "q3_k_l": lambda place: Type.Q5_K,
    "q4_k_s": lambda place: Type.Q5_K if place.index < 4 else None,
    "q4_k_m": _more_bits,
    "q5_k_m": _more_bits,
}
DOWN: Mapping[str, Choice] = {
    "q2_k": lambda place: Type.Q3_K,
    "q3_k_m": _first(16, Type.Q5_K, Type.Q4_K),
    "q3_k_l": lambda place: Type.Q5_K,
    "q4_k_s": _first(8, Type.Q5_K),
    "q4_k_m": _more_bits,
    "q5_k_m": _more_bits,
}
OUTPUT = {"q2_k": Type.Q3_K, "q3_k_m": Type.Q4_K, "q3_k_l": Type.Q5_K}
OUTPUT_OF_EIGHT = dict.fromkeys(("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m"), Type.Q5_K)


def tensor_types(name: str, shapes: Mapping[str, Sequence[int]], model: Model) -> dict[str, Type]:
    """The type of every tensor.

    :param name: One of `FILE_TYPES`.
    :param shapes: GGUF names to shapes, rows last.
    """
    default = FILE_TYPES[name][1]
    values = [n for n in _in_order(shapes) if re.search(r"attn_(v|qkv)\.weight", n)]
    places = {n: _Place(index, len(values), model) for index, n in enumerate(values)}
    downs = [n for n in _in_order(shapes) if "ffn_down" in n]
    for index, n in enumerate(downs):
        # Of experts llama.cpp counts layers, otherwise those that it has seen.
        places[n] = _Place(_layer(n) if model.experts > 1 else index, model.layers, model)
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    types = {}
    for n, shape in shapes.items():
        if not _quantizes(n, shape):
            types[n] = Type.F32
        elif default in PLAIN:
            types[n] = default
        else:
            chosen = _of_head(default, shape) if n == head else _chosen(name, n, places.get(n), model) or default
            types[n] = fitting(chosen, shape)
    return types


def fitting(chosen: Type, shape: Sequence[int]) -> Type:
    """The type, or the one that stands in for it where rows of this shape do not divide into its blocks."""
    for candidate in (chosen, FALLBACK.get(chosen, Type.F16)):
        if shape[-1] % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Type.F16


def size(kind: Type, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    block, width = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * width


def _quantizes(name: str, shape: Sequence[int]) -> bool:
    """Matrices and stacks of them; ggml does not count dimensions of one in front."""
    dimensions = len(shape) - next((i for i, size in enumerate(shape) if size > 1), len(shape))
    return dimensions >= 2 and name.endswith("weight") and not KEPT.search(name)


def _of_head(default: Type, shape: Sequence[int]) -> Type:
    """The head's, or that of the embedding which is the head as well."""
    whole = shape[-1] % GGML_QUANT_SIZES[default][0] == 0
    return Type.Q8_0 if default is Type.Q8_0 or not whole else Type.Q6_K


def _chosen(name: str, tensor: str, place: _Place | None, model: Model) -> Type | None:
    """What the mix says of a tensor; None where it says nothing."""
    if re.search(r"attn_(v|qkv)\.weight", tensor):
        assert place is not None
        if model.experts == 8:
            return Type.Q8_0
        chosen = VALUES[name](place) if name in VALUES else None
        if (model.arch, model.layers) in SEVENTY_B and (chosen or FILE_TYPES[name][1]) in (Type.Q3_K, Type.Q4_K):
            return Type.Q5_K
        return chosen
    if "attn_k.weight" in tensor and model.experts == 8:
        return Type.Q8_0
    if place is not None and name in DOWN:
        return DOWN[name](place)
    if "attn_output.weight" in tensor:
        return (OUTPUT_OF_EIGHT if model.experts == 8 else OUTPUT).get(name)
    return None


def _layer(name: str) -> int:
    """The layer that a tensor belongs to; -1 for those of none."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _in_order(names: Mapping[str, Sequence[int]]) -> list[str]:
    """As llama.cpp's quantizer goes through them."""
    return sorted(names, key=lambda name: (_layer(name), name))
