"""What a model family says about its GGUF files: the answer of a model plugin to how llama.cpp reads its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Value = bool | int | float | str | Sequence[bool] | Sequence[int] | Sequence[float]
"""What a GGUF key holds: int becomes uint32, float becomes float32, a sequence an array."""

ROPE_TYPES = frozenset({"default", "linear", "dynamic", "yarn"})
"""RoPE scalings that llama.cpp knows for all architectures, by transformers' names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gguf:
    """How a family is written as GGUF. Functions take the config of the decoder (`config.get_text_config()`)."""

    arch: str
    """llama.cpp's name of the architecture, `general.architecture`."""
    interleaved_rope: bool = False
    """Whether llama.cpp rotates neighbours (2i, 2i + 1) where transformers rotates halves (i, i + d / 2): the rows of
    queries and keys are written in that order."""
    rope_types: frozenset[str] = ROPE_TYPES
    """RoPE scalings that it knows for this architecture."""
    norm_offset: float = 0.0
    """Added to the weights of norms, for those that multiply by 1 + weight."""
    biases: bool = False
    """Whether llama.cpp reads biases of the linear layers."""
    activations: frozenset[str] = frozenset({"silu", "swish"})
    """Activations of the MLP, by transformers' names, that llama.cpp's own stands for."""
    part: str = ""
    """Prefix of the decoder's published names, for a model that has other parts, which are left out."""
    apart: tuple[str, ...] = ()
    """Prefixes of published names that do not belong to the decoder, where its own have none."""
    window: Callable[[PretrainedConfig], str | None] | None = None
    """Why the layers with a sliding window are not those that llama.cpp gives one, or None where they are. Without this
    function llama.cpp has no window for the family: the context written is then no longer than the window."""
    score_dim: Callable[[PretrainedConfig], float] | None = None
    """What llama.cpp divides attention scores by the root of, where the config has a `query_pre_attn_scalar`; what is
    left between the two goes into the queries."""
    query_norm: bool = False
    """Whether queries are normed after their projection, so that what goes into them goes into that norm."""
    keys: Callable[[PretrainedConfig], Mapping[str, Value]] | None = None
    """Further hyperparameters by their key after `{arch}.`, such as `attn_logit_softcapping`; they win over those that
    all families have."""
    refuses: Callable[[PretrainedConfig], str | None] | None = None
    """Why a config of the family cannot be written, or None."""
