"""Gemma 2: norms before and after attention and MLP, GeGLU, soft caps, and a sliding window in every other layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import Gguf, Value
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models.gemma import GELU, OFFSET, untied

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


def _gguf_keys(config: PretrainedConfig) -> dict[str, Value]:
    """Caps and window."""
    return {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _not_in_gguf(config: PretrainedConfig) -> str | None:
    """llama.cpp always caps, and reads no head of its own."""
    if not config.attn_logit_softcapping or not config.final_logit_softcapping:
        return "llama.cpp's gemma2 caps scores and logits"
    return untied(config)


def _other_windows(config: PretrainedConfig) -> str | None:
    """llama.cpp gives every other layer a window, from the first on."""
    wanted = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(config.num_hidden_layers)]
    return None if config.layer_types == wanted else "llama.cpp's gemma2 has its window in every other layer"


def _score_dim(config: PretrainedConfig) -> float:
    """llama.cpp tells the 27B model by its number of layers."""
    return config.hidden_size / config.num_attention_heads if config.num_hidden_layers == 46 else config.head_dim


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
        gguf=Gguf(
            arch="gemma2",
            norm_offset=1.0,
            activations=GELU,
            window=_other_windows,
            score_dim=_score_dim,
            keys=_gguf_keys,
            refuses=_not_in_gguf,
        ),
    )
