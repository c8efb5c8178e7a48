"""DeepSeek-V3's own architecture (V3, R1): latent attention (MLA), shared and routed experts.

The distillations of R1 are `model=llama` and `model=qwen2`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Chat, ModelConfig, ModelFamily, Plan, Role, hookimpl
from ftcore_models._dequantized import load
from ftcore_models._experts import DENSE, EXPERTS, quantized_dense
from ftcore_models._llama_like import TINY

if TYPE_CHECKING:
    from transformers import PreTrainedModel
TARGETS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""`q_proj` stands in place of `q_a_proj` and `q_b_proj` where the queries have no latent of their own."""


@dataclass
class Config(ModelConfig):
    """DeepSeek-V3's settings."""

    id: str = "deepseek-ai/DeepSeek-V3-0324"
    """Checkpoint id on the Hugging Face hub; its weights have 671e9 parameters."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with pre-norm, latent attention with interleaved RoPE on a part of each head, and experts in groups."""
    return ModelFamily(
        model_types=("deepseek_v3",),
        roles=(
            Role("rms_norm", "DeepseekV3RMSNorm"),
            Role("mlp", "DeepseekV3MLP"),
            Role("attention", "DeepseekV3Attention", frozenset({"latent_attention"})),
            Role("experts", "DeepseekV3Experts"),
            Role("lm_head", "DeepseekV3ForCausalLM"),
            Role("decoder_layer", "DeepseekV3DecoderLayer", frozenset({"latent_attention", "experts"})),
        ),
        lora_targets=TARGETS,
        lora_parameters=EXPERTS + DENSE,
        tiny={name: value for name, value in TINY.items() if name != "head_dim"}
        | {
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
        checkpoints=("deepseek-ai/DeepSeek-V3-0324", "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1-0528"),
        chat=Chat(turn_ends=("<｜end▁of▁sentence｜>",), thinking=("<think>", "</think>")),
        sampling={"thinking": {"temperature": 0.6, "top_p": 0.95}},
        limits=(quantized_dense(TARGETS[1:], lambda config: True),),
    )


@hookimpl
def ftcore_load_model(plan: Plan, quantization: Any | None) -> PreTrainedModel:
    """The published weights are blocks of fp8, which cannot be trained on: they are dequantized."""
    return load(plan, quantization, "fp8", "FineGrainedFP8Config")
