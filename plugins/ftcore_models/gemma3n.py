"""Gemma 3n (E2B, E4B), the text part: alternating updates, per-layer embeddings, shared keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftcore import Chat, ModelConfig, ModelFamily, Plan, Role, hookimpl
from ftcore.defaults import model as core
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models.gemma3 import SAMPLING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARED = frozenset({"value_norm", "shared_keys_and_values"})
LAYER = frozenset({"qk_norm", "sandwich_norm", "alternating_updates"})


@dataclass
class Config(ModelConfig):
    """Gemma 3n's settings."""

    id: str = "google/gemma-3n-E2B-it"
    """Checkpoint id on the Hugging Face hub; only its text part is loaded."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Gemma 3's attention inside alternating updates (AltUp) with learned augmented residuals (LAuReL)."""
    return ModelFamily(
        model_types=("gemma3n_text", "gemma3n"),
        roles=(
            Role("rms_norm", "Gemma3nRMSNorm", frozenset({"weight_in_float32", "norm_without_weight"})),
            Role("mlp", "Gemma3nTextMLP", frozenset({"geglu", "activation_sparsity"})),
            Role("attention", "Gemma3nTextAttention", SHARED | {"qk_norm"}),
            Role("lm_head", "Gemma3nForCausalLM"),
            Role("decoder_layer", "Gemma3nTextDecoderLayer", SHARED | LAYER),
        ),
        lora_targets=LORA_TARGETS,
        tiny=TINY
        | {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "sliding_window": 8,
            "vocab_size_per_layer_input": 259,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "final_logit_softcapping": 3.0,  # so low that a mistake shows
        },
        checkpoints=("google/gemma-3n-E2B-it", "google/gemma-3n-E4B-it", "google/gemma-3n-E2B", "google/gemma-3n-E4B"),
        chat=Chat(turn_ends=("<end_of_turn>",)),
        sampling=SAMPLING,
    )


@hookimpl
def ftcore_load_model(plan: Plan, quantization: Any) -> PreTrainedModel:
    """Of a checkpoint with towers for images and sound the text part alone, unlike transformers' auto class."""
    assert plan.run.model is not None
    if hasattr(quantization, "llm_int8_skip_modules"):  # AltUp clamps its weights in place, and they are small
        skipped = quantization.llm_int8_skip_modules or ["lm_head"]
        quantization.llm_int8_skip_modules = [*skipped, "prediction_coefs", "correction_coefs"]
    if not (plan.run.model.tiny or plan.run.model.shape):
        plan = replace(plan, family=replace(plan.family, auto_class="Gemma3nForCausalLM"))
    model: PreTrainedModel = core.ftcore_load_model(plan=plan, quantization=quantization)
    return model
