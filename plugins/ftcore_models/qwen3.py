"""Qwen3, dense: Llama's layers with a norm on every query and key head."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import Gguf
from ftcore_models._llama_like import LORA_TARGETS, TINY

_COMMON = {
    "vocab_size": 151936,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
SHAPES = {
    "qwen3-0.6b": _COMMON | {"hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": _COMMON | {"hidden_size": 2048, "intermediate_size": 6144},
}
CHAT = Chat(turn_ends=("<|im_end|>",), thinking=("<think>", "</think>"))
SAMPLING = {
    "instruct": {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.0},
    "thinking": {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0},
}


@dataclass
class Config(ModelConfig):
    """Qwen3's settings."""

    id: str = "Qwen/Qwen3-0.6B"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with pre-norm, QK-norm, grouped-query attention, RoPE and SwiGLU."""
    return ModelFamily(
        model_types=("qwen3",),
        roles=(
            Role("rms_norm", "Qwen3RMSNorm"),
            Role("mlp", "Qwen3MLP"),
            Role("attention", "Qwen3Attention", frozenset({"qk_norm"})),
            Role("lm_head", "Qwen3ForCausalLM"),
            Role("decoder_layer", "Qwen3DecoderLayer", frozenset({"qk_norm", "sliding_window"})),
        ),
        lora_targets=LORA_TARGETS,
        tiny=TINY,
        shapes=SHAPES,
        checkpoints=(
            *(f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")),
            "Qwen/Qwen3-4B-Instruct-2507",
            "Qwen/Qwen3-4B-Thinking-2507",
            "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
        ),
        chat=CHAT,
        sampling=SAMPLING,
        gguf=Gguf(arch="qwen3"),
    )
