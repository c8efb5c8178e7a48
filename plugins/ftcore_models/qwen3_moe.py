"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention, and eight of 128 experts for each token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import Gguf, Value
from ftcore_models._experts import ATTENTION_TARGETS, DENSE, EXPERTS, quantized_dense
from ftcore_models._llama_like import TINY
from ftcore_models.qwen3 import CHAT, SAMPLING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_30B_A3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
SHAPES = {
    "qwen3-30b-a3b": _30B_A3B,
    # Published nowhere: four of the 48 layers and 32 of the 128 experts, still eight for each token, to measure.
    "qwen3-moe-1.3b-cut": _30B_A3B | {"num_hidden_layers": 4, "num_experts": 32},
}


@dataclass
class Config(ModelConfig):
    """Qwen3-MoE's settings."""

    id: str = "Qwen/Qwen3-30B-A3B-Instruct-2507"
    """Checkpoint id on the Hugging Face hub."""


def _has_dense(config: Mapping[str, Any]) -> bool:
    """Whether some layers have an MLP in place of experts; the published checkpoints have none."""
    return bool(config.get("mlp_only_layers")) or config.get("decoder_sparse_step", 1) > 1


def _gguf_keys(config: PretrainedConfig) -> dict[str, Value]:
    """Hyperparameters of the experts."""
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _not_in_gguf(config: PretrainedConfig) -> str | None:
    """llama.cpp has experts in all layers, and the weights of the chosen ones sum up to 1."""
    if _has_dense(config.to_dict()):
        return "llama.cpp's qwen3moe has experts in all layers"
    return None if config.norm_topk_prob else "llama.cpp's qwen3moe norms the weights of the experts (`norm_topk_prob`)"


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with pre-norm, QK-norm, grouped-query attention, RoPE, and a mixture of experts in all or most layers."""
    return ModelFamily(
        model_types=("qwen3_moe",),
        roles=(
            Role("rms_norm", "Qwen3MoeRMSNorm"),
            Role("mlp", "Qwen3MoeMLP"),
            Role("attention", "Qwen3MoeAttention", frozenset({"qk_norm"})),
            Role("experts", "Qwen3MoeExperts"),
            Role("lm_head", "Qwen3MoeForCausalLM"),
            Role("decoder_layer", "Qwen3MoeDecoderLayer", frozenset({"qk_norm", "sliding_window", "experts"})),
        ),
        lora_targets=ATTENTION_TARGETS,
        lora_parameters=EXPERTS + DENSE,
        # One layer of each kind; published checkpoints have experts in all.
        tiny=TINY
        | {
            "mlp_only_layers": [0],
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        shapes=SHAPES,
        checkpoints=(
            "Qwen/Qwen3-30B-A3B-Instruct-2507",
            "Qwen/Qwen3-30B-A3B-Thinking-2507",
            "Qwen/Qwen3-30B-A3B",
            "Qwen/Qwen3-235B-A22B",
        ),
        chat=CHAT,
        sampling=SAMPLING,
        limits=(quantized_dense(ATTENTION_TARGETS, _has_dense),),
        gguf=Gguf(arch="qwen3moe", keys=_gguf_keys, refuses=_not_in_gguf),
    )
