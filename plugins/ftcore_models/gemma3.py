"""Gemma 3, text only (270M, 1B): Gemma 2's layers with QK-norm in place of the soft caps, and two kinds of RoPE."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._llama_like import LORA_TARGETS, TINY

OFFSET = frozenset({"unit_offset"})

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
    )
