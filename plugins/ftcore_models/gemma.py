"""Gemma, the first: Llama's layers with norms of unit offset, GeGLU, and heads of 256."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import Gguf
from ftcore_models._llama_like import LORA_TARGETS, TINY

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OFFSET = frozenset({"unit_offset"})
GELU = frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu"})  # hub configs of Gemma say "gelu" and mean the first

_COMMON = {
    "vocab_size": 256000,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SHAPES = {
    "gemma-2b": _COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
    },
    "gemma-7b": _COMMON
    | {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
}


@dataclass
class Config(ModelConfig):
    """Gemma's settings."""

    id: str = "google/gemma-2b-it"
    """Checkpoint id on the Hugging Face hub."""


def untied(config: PretrainedConfig) -> str | None:
    """Why a config cannot be written as GGUF: llama.cpp reads no head of its own."""
    return None if config.tie_word_embeddings else "llama.cpp's Gemma has its embedding as the head, not another one"


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with pre-norm of unit offset, RoPE, GeGLU, and embeddings scaled by the square root of the width."""
    return ModelFamily(
        model_types=("gemma",),
        roles=(
            Role("rms_norm", "GemmaRMSNorm", OFFSET),
            Role("mlp", "GemmaMLP", frozenset({"geglu"})),
            Role("attention", "GemmaAttention"),
            Role("lm_head", "GemmaForCausalLM"),
            Role("decoder_layer", "GemmaDecoderLayer", OFFSET),
        ),
        lora_targets=LORA_TARGETS,
        tiny=TINY,
        shapes=SHAPES,
        checkpoints=("google/gemma-2b-it", "google/gemma-7b-it", "google/gemma-1.1-2b-it", "google/gemma-1.1-7b-it"),
        chat=Chat(turn_ends=("<end_of_turn>",), system=False),
        gguf=Gguf(arch="gemma", norm_offset=1.0, activations=GELU, refuses=untied),
    )
