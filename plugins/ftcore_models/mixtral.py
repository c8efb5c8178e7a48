"""Mixtral 8x7B and 8x22B: Mistral's attention, and two of eight experts for each token."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._experts import ATTENTION_TARGETS, EXPERTS
from ftcore_models._llama_like import TINY
from ftcore_models.mistral import WINDOW

SHAPES = {
    "mixtral-8x7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }
}


@dataclass
class Config(ModelConfig):
    """Mixtral's settings."""

    id: str = "mistralai/Mixtral-8x7B-Instruct-v0.1"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Llama's layer plan with a mixture of experts in place of every MLP."""
    return ModelFamily(
        model_types=("mixtral",),
        roles=(
            Role("rms_norm", "MixtralRMSNorm"),
            Role("attention", "MixtralAttention", WINDOW),
            Role("experts", "MixtralExperts"),
            Role("lm_head", "MixtralForCausalLM"),
            Role("decoder_layer", "MixtralDecoderLayer", WINDOW | {"experts"}),
        ),
        lora_targets=ATTENTION_TARGETS,
        lora_parameters=EXPERTS,
        tiny=TINY | {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        shapes=SHAPES,
        checkpoints=("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        chat=Chat(turn_ends=("</s>",)),
    )
