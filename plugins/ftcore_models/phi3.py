"""Phi-3, Phi-3.5 and Phi-4 of type `phi3`: Llama's layers with fused projections, and RoPE on a part of each head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import ROPE_TYPES, Gguf, Value
from ftcore_models._llama_like import TINY

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FUSED = frozenset({"fused_projections"})
# The attention takes its window from the config, not from an attribute of the module.
ATTENTION = FUSED | {"sliding_window"}

SHAPES = {
    "phi3-mini-4k": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_window": 2047,
    },
    "phi4-14b": {
        "vocab_size": 100352,
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 250000.0},
        "sliding_window": None,
    },
}


@dataclass
class Config(ModelConfig):
    """Phi-3's settings."""

    id: str = "microsoft/Phi-3-mini-4k-instruct"
    """Checkpoint id on the Hugging Face hub."""


def _gguf_keys(config: PretrainedConfig) -> dict[str, Value]:
    """A window of 0 is how llama.cpp tells Phi-4 from the others; it uses none."""
    return {"attention.sliding_window": config.sliding_window or 0}


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Llama's layer plan with one projection for queries, keys and values, and one for gate and up."""
    return ModelFamily(
        model_types=("phi3",),
        roles=(
            Role("rms_norm", "Phi3RMSNorm"),
            Role("mlp", "Phi3MLP", FUSED),
            Role("attention", "Phi3Attention", ATTENTION),
            Role("lm_head", "Phi3ForCausalLM"),
            Role("decoder_layer", "Phi3DecoderLayer", ATTENTION),
        ),
        lora_targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        tiny=TINY
        | {
            "eos_token_id": None,  # the default ones are outside the small vocabulary
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
            "sliding_window": 8,
        },
        shapes=SHAPES,
        checkpoints=(
            "microsoft/Phi-3-mini-4k-instruct",
            "microsoft/Phi-3-mini-128k-instruct",
            "microsoft/Phi-3.5-mini-instruct",
            "microsoft/phi-4",
            "microsoft/Phi-4-mini-instruct",
        ),
        chat=Chat(turn_ends=("<|end|>", "<|im_end|>")),
        gguf=Gguf(arch="phi3", rope_types=ROPE_TYPES | {"longrope"}, keys=_gguf_keys),
    )
