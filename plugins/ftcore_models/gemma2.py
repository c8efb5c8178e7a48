"""Gemma 2: norms before and after attention and MLP, GeGLU, soft caps, and a sliding window in every other layer."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._llama_like import LORA_TARGETS, TINY

OFFSET = frozenset({"unit_offset"})

SHAPES = {
    "gemma2-2b": {
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
}


@dataclass
class Config(ModelConfig):
    """Gemma 2's settings."""

    id: str = "google/gemma-2-2b-it"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with sandwich norms of unit offset, GeGLU, and soft caps on attention scores and logits."""
    return ModelFamily(
        model_types=("gemma2",),
        roles=(
            Role("rms_norm", "Gemma2RMSNorm", OFFSET),
            Role("mlp", "Gemma2MLP", frozenset({"geglu"})),
            Role("attention", "Gemma2Attention", frozenset({"attention_softcap"})),
            Role("lm_head", "Gemma2ForCausalLM"),
            Role(
                "decoder_layer",
                "Gemma2DecoderLayer",
                OFFSET | {"sandwich_norm", "sliding_window", "attention_softcap"},
            ),
        ),
        lora_targets=LORA_TARGETS,
        # The caps are low and the scale is not that of the width, so that a mistake in them shows.
        tiny=TINY
        | {
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
        shapes=SHAPES,
        checkpoints=tuple(f"google/gemma-2-{size}-it" for size in ("2b", "9b", "27b")),
        chat=Chat(turn_ends=("<end_of_turn>",), system=False),
    )
