"""LFM2 and LFM2.5, dense: short convolutions in most layers, grouped-query attention in the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import Gguf, Value
from ftcore_models._llama_like import TINY
from ftcore_models._packing import no_packing

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAMES = frozenset({"own_projection_names"})

_COMMON = {
    "vocab_size": 65536,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128000,
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "conv_bias": False,
    "block_multiple_of": 256,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
SHAPES = {
    "lfm2-350m": _COMMON | {"hidden_size": 1024, "intermediate_size": 6656, "num_attention_heads": 16},
    "lfm2-1.2b": _COMMON | {"hidden_size": 2048, "intermediate_size": 12288, "num_attention_heads": 32},
}


@dataclass
class Config(ModelConfig):
    """LFM2's settings."""

    id: str = "LiquidAI/LFM2-350M"
    """Checkpoint id on the Hugging Face hub."""


def _gguf_keys(config: PretrainedConfig) -> dict[str, Value]:
    """Layers without attention have no heads; the MLP's width as transformers rounds it."""
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if config.block_ffn_dim_multiplier is not None:
            width = int(config.block_ffn_dim_multiplier * width)
            width = -(-width // config.block_multiple_of) * config.block_multiple_of
    kinds = config.layer_types
    return {
        "feed_forward_length": width,
        "attention.head_count_kv": [0 if kind == "conv" else config.num_key_value_heads for kind in kinds],
        "shortconv.l_cache": config.conv_L_cache,
    }


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Pre-norm layers of gated short convolutions or of attention with QK-norm, and SwiGLU."""
    return ModelFamily(
        model_types=("lfm2",),
        roles=(
            Role("rms_norm", "Lfm2RMSNorm"),
            Role("mlp", "Lfm2MLP", NAMES),
            Role("attention", "Lfm2Attention", NAMES | {"qk_norm"}),
            Role("lm_head", "Lfm2ForCausalLM"),
            Role("decoder_layer", "Lfm2DecoderLayer", NAMES | {"qk_norm", "short_convolution"}),
        ),
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"),
        tiny={name: value for name, value in TINY.items() if name != "head_dim"}
        | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        shapes=SHAPES,
        checkpoints=(
            "LiquidAI/LFM2-350M",
            "LiquidAI/LFM2-700M",
            "LiquidAI/LFM2-1.2B",
            "LiquidAI/LFM2-2.6B",
            "LiquidAI/LFM2.5-1.2B-Base",
            "LiquidAI/LFM2.5-1.2B-Instruct",
            "LiquidAI/LFM2.5-1.2B-Thinking",
        ),
        chat=Chat(turn_ends=("<|im_end|>",), thinking=("<think>", "</think>")),
        sampling={
            "instruct": {"temperature": 0.1, "top_k": 50, "top_p": 0.1, "repetition_penalty": 1.05},
            "thinking": {"temperature": 0.05, "top_k": 50, "repetition_penalty": 1.05},
        },
        limits=(no_packing("a short convolution would carry the end of one document into the next"),),
        gguf=Gguf(arch="lfm2", keys=_gguf_keys),
    )
