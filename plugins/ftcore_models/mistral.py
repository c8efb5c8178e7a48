"""Mistral 7B and every other dense checkpoint of type `mistral`."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models.llama import GGUF

# The attention takes its window from the config, not from an attribute of the module.
WINDOW = frozenset({"sliding_window"})

_7B_V3 = {
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_window": None,
}
SHAPES = {
    "mistral-7b-v0.3": _7B_V3,
    "mistral-1.1b-cut": _7B_V3 | {"num_hidden_layers": 4},  # published nowhere: four of the 32 layers, to measure
}


@dataclass
class Config(ModelConfig):
    """Mistral's settings."""

    id: str = "mistralai/Mistral-7B-Instruct-v0.3"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Llama's layer plan, with a sliding window in the first version."""
    return ModelFamily(
        model_types=("mistral",),
        roles=(
            Role("rms_norm", "MistralRMSNorm"),
            Role("mlp", "MistralMLP"),
            Role("attention", "MistralAttention", WINDOW),
            Role("lm_head", "MistralForCausalLM"),
            Role("decoder_layer", "MistralDecoderLayer", WINDOW),
        ),
        lora_targets=LORA_TARGETS,
        tiny=TINY | {"sliding_window": 8},
        shapes=SHAPES,
        checkpoints=tuple(f"mistralai/Mistral-7B-Instruct-v0.{version}" for version in (3, 2, 1)),
        chat=Chat(turn_ends=("</s>",)),
        gguf=GGUF,
    )
