"""Llama 4 (Scout, Maverick), the text part: attention in chunks, layers without RoPE, shared and routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Chat, ModelConfig, ModelFamily, Plan, Role, hookimpl
from ftcore.defaults import model as core
from ftcore_models._experts import EXPERTS
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models._packing import no_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = frozenset({"interleaved_rope", "chunked_attention", "norm_after_rope"})
FLOOR = 8192
"""Tokens after which the temperature of attention without RoPE first rises, in all published sizes (`floor_scale`)."""


@dataclass
class Config(ModelConfig):
    """Llama 4's settings."""

    id: str = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
    """Checkpoint id on the Hugging Face hub; only its text part is loaded."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Decoder with pre-norm, QK-norm after RoPE, full attention without RoPE in every fourth layer, and experts."""
    return ModelFamily(
        model_types=("llama4_text", "llama4"),
        roles=(
            Role("rms_norm", "Llama4TextRMSNorm"),
            Role("mlp", "Llama4TextMLP"),
            Role("attention", "Llama4TextAttention", ATTENTION),
            Role("experts", "Llama4TextExperts", frozenset({"all_experts_run"})),
            Role("lm_head", "Llama4ForCausalLM"),
            Role("decoder_layer", "Llama4TextDecoderLayer", ATTENTION | {"experts"}),
        ),
        lora_targets=LORA_TARGETS,
        lora_parameters=EXPERTS,
        # Both kinds of attention, an MLP and experts.
        tiny=TINY
        | {
            "intermediate_size": 64,
            "intermediate_size_mlp": 192,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "pad_token_id": None,
        },
        checkpoints=("meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
        chat=Chat(turn_ends=("<|eot|>",)),
        limits=(no_packing("from 8192 tokens on the temperature of attention goes by the place in the row", FLOOR),),
    )


@hookimpl
def ftcore_load_model(plan: Plan, quantization: Any | None) -> PreTrainedModel:
    """Of a checkpoint with a vision tower the text part alone, with the names by which trainers find its parts.

    transformers 5 gives the class the prefix of the whole checkpoint, so that `base_model` is the model itself, and
    heads that ask it for hidden states, TRL's and ftcore's, would get logits. TRL's router loss asks for `num_experts`.
    """
    model: PreTrainedModel = core.ftcore_load_model(plan=plan, quantization=quantization)
    model.base_model_prefix = "model"
    model.config.num_experts = model.config.num_local_experts
    return model
