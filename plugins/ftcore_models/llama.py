"""Llama 3, 3.1, 3.2 and 3.3, DeepSeek-R1's Llama distillations, and every other checkpoint of type `llama`."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import ROPE_TYPES, Gguf
from ftcore_models._llama_like import LORA_TARGETS, TINY

ROLES = (
    Role("rms_norm", "LlamaRMSNorm"),
    Role("mlp", "LlamaMLP"),
    Role("attention", "LlamaAttention"),
    Role("lm_head", "LlamaForCausalLM"),
    Role("decoder_layer", "LlamaDecoderLayer"),
)

GGUF = Gguf(arch="llama", interleaved_rope=True, biases=True, rope_types=ROPE_TYPES | {"llama3", "longrope"})
_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "llama3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": {**_ROPE, "factor": 32.0},
    },
    "llama3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {**_ROPE, "factor": 8.0},
    },
}
CHECKPOINTS = (
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "meta-llama/Meta-Llama-3-70B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
    "meta-llama/Llama-3.1-70B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.3-70B-Instruct",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
)


@dataclass
class Config(ModelConfig):
    """Llama's settings."""

    id: str = "meta-llama/Llama-3.2-1B-Instruct"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with pre-norm, grouped-query attention, RoPE and SwiGLU."""
    return ModelFamily(
        model_types=("llama",),
        roles=ROLES,
        lora_targets=LORA_TARGETS,
        tiny=TINY,
        shapes=SHAPES,
        checkpoints=CHECKPOINTS,
        chat=Chat(turn_ends=("<|eot_id|>", "<|eom_id|>")),
        sampling={
            "instruct": {"temperature": 0.6, "top_p": 0.9},
            "thinking": {"temperature": 0.6, "top_p": 0.95},  # R1's distillations
        },
        gguf=GGUF,
    )
