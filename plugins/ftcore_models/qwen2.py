"""Qwen2, Qwen2.5 and DeepSeek-R1's Qwen distillations: Llama's layers with biases on queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import Gguf
from ftcore_models._llama_like import LORA_TARGETS, TINY

_ROPE = {"rope_type": "default", "rope_theta": 1000000.0}
SHAPES = {
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": _ROPE,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": _ROPE,
    },
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": _ROPE,
    },
}


@dataclass
class Config(ModelConfig):
    """Qwen2's settings."""

    id: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Llama's layer plan with biases on the projections, and a sliding window in upper layers where the config asks."""
    return ModelFamily(
        model_types=("qwen2",),
        roles=(
            Role("rms_norm", "Qwen2RMSNorm"),
            Role("mlp", "Qwen2MLP"),
            Role("attention", "Qwen2Attention"),
            Role("lm_head", "Qwen2ForCausalLM"),
            Role("decoder_layer", "Qwen2DecoderLayer", frozenset({"sliding_window"})),
        ),
        lora_targets=LORA_TARGETS,
        tiny=TINY | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        shapes=SHAPES,
        checkpoints=(
            *(f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")),
            *(f"deepseek-ai/DeepSeek-R1-Distill-Qwen-{size}" for size in ("1.5B", "7B", "14B", "32B")),
        ),
        chat=Chat(turn_ends=("<|im_end|>",)),
        sampling={
            "instruct": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
            "thinking": {"temperature": 0.6, "top_p": 0.95},  # R1's distillations
        },
        gguf=Gguf(arch="qwen2", biases=True),
    )
