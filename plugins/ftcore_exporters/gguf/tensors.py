"""A model's published weights as the tensors that llama.cpp reads: named, reordered, stacked, still unread."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gguf

from ftcore import Problem, Refused
from ftcore.gguf_facts import Gguf
from ftcore.weights import Weight, Weights

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

CHUNK = 4 * 2**20
"""Values read at once: 16 MiB in float32."""
Change = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Weight, ...]
    """One after the other: experts of a layer, or a single weight."""
    changes: tuple[Change, ...] = ()
    """Applied to whole rows."""
    together: int = 1
    """Rows that must not be read apart."""

    def chunks(self) -> Iterator[torch.Tensor]:
        """The rows in order, in float32 or as stored, some 16 MiB at a time."""
        for part in self.parts:
            step = max(1, CHUNK // (math.prod(part.shape[1:]) * self.together)) * self.together
            for start in range(0, part.shape[0], step):
                rows = part.rows(start, min(start + step, part.shape[0]))
                for change in self.changes:
                    rows = change(rows)
                yield rows


def tensors_of(weights: Weights, config: PretrainedConfig, facts: Gguf) -> list[Tensor]:
    """The tensors of the decoder, in the order of the layers.

    Raises Refused for a weight that llama.cpp has no place for.
    """
    names = name_map(config, facts)
    found: dict[str, dict[int, Weight]] = {}
    for published, weight in weights.items():
        if published.startswith(facts.part) and not published.startswith(facts.apart):
            stack, number = _expert(published)
            found.setdefault(stack, {})[number] = weight
    made = [_tensor(name, [w for _, w in sorted(parts.items())], names, config, facts) for name, parts in found.items()]
    return sorted(made, key=lambda tensor: (_layer(tensor.name), tensor.name))


def name_map(config: PretrainedConfig, facts: Gguf) -> gguf.TensorNameMap:
    """Published names to GGUF's, for one architecture."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == facts.arch)
    return gguf.get_tensor_name_map(arch, config.num_hidden_layers)


def gguf_name(published: str, names: gguf.TensorNameMap, facts: Gguf) -> str:
    """GGUF's name of a published weight or bias. Raises Refused where llama.cpp has none."""
    name = names.get_name(published.removeprefix(facts.part), try_suffixes=(".weight", ".bias"))
    if name is None or (name.endswith(".bias") and not facts.biases):
        message = f"llama.cpp's architecture '{facts.arch}' has no place for {published}"
        raise Refused(Problem("export.gguf", message, "use +export=[safetensors]"))
    return name


def neighbours(head_dim: int) -> Change:
    """Rows of each head from halves (i, i + d / 2) to neighbours (2i, 2i + 1)."""

    def change(rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)

    return change


def changes_of(published: str, config: PretrainedConfig, facts: Gguf) -> tuple[Change, ...]:
    """What becomes of the rows of a published weight besides rounding, which also goes for a LoRA's B."""
    made: list[Change] = []
    queries, keys = ".q_proj." in published, ".k_proj." in published
    if facts.interleaved_rope and (queries or keys):
        made.append(neighbours(head_dim(config)))
    if facts.norm_offset and published.endswith("norm.weight"):
        made.append(lambda rows: rows.float() + facts.norm_offset)
    factor = query_factor(config, facts)
    if factor != 1.0 and (".q_norm." if facts.query_norm else ".q_proj.") in published:
        made.append(lambda rows: rows.float() * factor)
    return tuple(made)


def query_factor(config: PretrainedConfig, facts: Gguf) -> float:
    """What queries are multiplied by, so that llama.cpp's scale of the scores becomes the config's."""
    if facts.score_dim is None:
        return 1.0
    return math.sqrt(facts.score_dim(config) / config.query_pre_attn_scalar)


def head_dim(config: PretrainedConfig) -> int:
    """Width of an attention head."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def _tensor(
    published: str, parts: Sequence[Weight], names: gguf.TensorNameMap, config: PretrainedConfig, facts: Gguf
) -> Tensor:
    shape = parts[0].shape
    changes = changes_of(published, config, facts)
    if ".experts." in published:
        shape = (len(parts), *shape)
    elif len(shape) == 3 and shape[1] == 1:  # a convolution of each channel by itself
        shape = (shape[0], shape[2])
        changes = (*changes, lambda rows: rows.squeeze(1))
    together = head_dim(config) if facts.interleaved_rope and re.search(r"\.[qk]_proj\.", published) else 1
    return Tensor(gguf_name(published, names, facts), shape, tuple(parts), changes, together)


def _expert(published: str) -> tuple[str, int]:
    """The name of the stack that an expert's weight goes into, and its place there; a weight of none is its own."""
    found = re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", published)
    return (found[1] + found[3], int(found[2])) if found else (published, 0)


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1
