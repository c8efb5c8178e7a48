"""Gemma 3, text only (270M, 1B): Gemma 2's layers with QK-norm in place of the soft caps, and two kinds of RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import Gguf, Value
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models.gemma import GELU, OFFSET

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_COMMON = {
    "vocab_size": 262144,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
}
# transformers' default makes every sixth layer a global one.
SHAPES = {
    "gemma3-270m": _COMMON | {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18},
    "gemma3-1b": _COMMON | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26},
}
SAMPLING = {"instruct": {"temperature": 1.0, "top_k": 64, "top_p": 0.95}}


def _gguf_keys(config: PretrainedConfig) -> dict[str, Value]:
    """Window and cap."""
    keys: dict[str, Value] = {"attention.sliding_window": config.sliding_window}
    if config.final_logit_softcapping:
        keys["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return keys


def _not_in_gguf(config: PretrainedConfig) -> str | None:
    """llama.cpp has causal attention without caps."""
    if config.use_bidirectional_attention:
        return "llama.cpp's gemma3 has causal attention"
    return "llama.cpp's gemma3 caps no scores" if config.attn_logit_softcapping else None


def _other_windows(config: PretrainedConfig) -> str | None:
    """llama.cpp gives every sixth layer full attention."""
    wanted = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(config.num_hidden_layers)]
    return None if config.layer_types == wanted else "llama.cpp's gemma3 has full attention in every sixth layer"


def _score_dim(config: PretrainedConfig) -> float:
    """llama.cpp tells the 27B model by its number of layers."""
    return config.hidden_size / config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim


GGUF = Gguf(
    arch="gemma3",
    norm_offset=1.0,
    activations=GELU,
    window=_other_windows,
    score_dim=_score_dim,
    query_norm=True,
    keys=_gguf_keys,
    refuses=_not_in_gguf,
)


@dataclass
class Config(ModelConfig):
    """Gemma 3's settings."""

    id: str = "google/gemma-3-1b-it"
    """Checkpoint id on the Hugging Face hub; one of the text-only sizes."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with sandwich norms of unit offset, QK-norm, GeGLU, and local and global attention."""
    return ModelFamily(
        model_types=("gemma3_text",),
        roles=(
            Role("rms_norm", "Gemma3RMSNorm", OFFSET),
            Role("mlp", "Gemma3MLP", frozenset({"geglu"})),
            Role("attention", "Gemma3Attention", frozenset({"qk_norm"})),
            Role("lm_head", "Gemma3ForCausalLM"),
            Role("decoder_layer", "Gemma3DecoderLayer", OFFSET | {"sandwich_norm", "qk_norm", "sliding_window"}),
        ),
        lora_targets=LORA_TARGETS,
        tiny=TINY
        | {
            "query_pre_attn_scalar": 24,  # not the heads' width, so that a mistake in the scale shows
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        shapes=SHAPES,
        checkpoints=("google/gemma-3-1b-it", "google/gemma-3-270m-it", "google/gemma-3-1b-pt", "google/gemma-3-270m"),
        chat=Chat(turn_ends=("<end_of_turn>",)),
        sampling=SAMPLING,
        gguf=GGUF,
    )
