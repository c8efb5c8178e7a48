"""gpt-oss 20B and 120B: attention with sinks, a window in every other layer, and experts with biases."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Chat, ModelConfig, ModelFamily, Plan, Role, hookimpl
from ftcore_models._dequantized import load
from ftcore_models._experts import ATTENTION_TARGETS, EXPERTS
from ftcore_models._llama_like import TINY
from ftcore_models._packing import no_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NORM = frozenset({"weight_in_float32"})
ATTENTION = frozenset({"attention_sinks", "half_width_rope"})

_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_COMMON = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": _ROPE,
}
SHAPES = {"gpt-oss-20b": _COMMON | {"num_hidden_layers": 24, "num_local_experts": 32}}


@dataclass
class Config(ModelConfig):
    """gpt-oss's settings."""

    id: str = "openai/gpt-oss-20b"
    """Checkpoint id on the Hugging Face hub; its MXFP4 experts are dequantized to be trained."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with pre-norm, grouped-query attention with a learned sink per head, YaRN, and clamped SwiGLU experts."""
    return ModelFamily(
        model_types=("gpt_oss",),
        roles=(
            Role("rms_norm", "GptOssRMSNorm", NORM),
            Role("attention", "GptOssAttention", ATTENTION),
            Role("experts", "GptOssExperts", frozenset({"expert_biases", "clamped_swiglu", "interleaved_gate_up"})),
            Role("lm_head", "GptOssForCausalLM"),
            Role("decoder_layer", "GptOssDecoderLayer", NORM | ATTENTION | {"sliding_window", "experts"}),
        ),
        lora_targets=ATTENTION_TARGETS,
        lora_parameters=EXPERTS,
        tiny=TINY
        | {
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": _ROPE | {"original_max_position_embeddings": 64},
        },
        shapes=SHAPES,
        checkpoints=("openai/gpt-oss-20b", "openai/gpt-oss-120b"),
        chat=Chat(turn_ends=("<|return|>", "<|call|>"), thinking=("<|channel|>analysis<|message|>", "<|end|>")),
        sampling={"thinking": {"temperature": 1.0, "top_p": 1.0}},
        limits=(no_packing("transformers' gpt-oss does not tell packed documents apart in its masks"),),
    )


@hookimpl
def ftcore_load_model(plan: Plan, quantization: Any | None) -> PreTrainedModel:
    """The published experts are MXFP4, which cannot be trained on: they are dequantized."""
    return load(plan, quantization, "mxfp4", "Mxfp4Config")
