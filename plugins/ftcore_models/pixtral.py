"""Pixtral 12B, as transformers ships it: Llava's wiring of Mistral's decoder and a tower with RoPE in two axes."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Plan, Problem, Refused, Role, Vision, hookimpl
from ftcore.checkpoint import settings
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models._vision import chatml

TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")


@dataclass
class Config(ModelConfig):
    """Pixtral's settings."""

    id: str = "mistral-community/pixtral-12b"
    """Checkpoint id on the Hugging Face hub, in transformers' format."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """Other checkpoints of Llava's type have other towers."""
    assert plan.run.model is not None
    try:
        found = settings(plan.run.model, plan.family).get("vision_config", {}).get("model_type", "pixtral")
    except (Refused, KeyError):  # a problem of the checkpoint's own, named by another check
        return []
    if found == "pixtral":
        return []
    message = f"its tower is '{found}', and this family is Llava's with a 'pixtral' tower"
    return [Problem("model", message, "use a Pixtral checkpoint in transformers' format")]


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Mistral's decoder; the tower has RMSNorm, and an activation in its gated MLP that the checkpoint chooses."""
    return ModelFamily(
        model_types=("llava",),
        roles=(
            Role("rms_norm", "MistralRMSNorm"),
            Role("rms_norm", "PixtralRMSNorm"),
            Role("mlp", "MistralMLP"),
            Role("mlp", "PixtralMLP", frozenset({"geglu"})),
            Role("attention", "MistralAttention"),
            Role("lm_head", "LlavaForConditionalGeneration"),
            Role("decoder_layer", "MistralDecoderLayer", frozenset({"sliding_window"})),
            Role("vision_attention", "PixtralAttention"),
        ),
        lora_targets=LORA_TARGETS,
        tiny={
            "text_config": TINY
            | {
                "model_type": "mistral",
                "vocab_size": 262,
                "sliding_window": None,
                "bos_token_id": None,
                "eos_token_id": 258,
                "pad_token_id": 256,
            },
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "head_dim": 16,
                "image_size": 64,
                "patch_size": 16,
            },
            "image_token_index": 259,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        auto_class="AutoModelForImageTextToText",
        chat_template=chatml("[IMG]"),
        checkpoints=("mistral-community/pixtral-12b",),
        chat=Chat(turn_ends=("</s>",), system=False),
        vision=Vision(
            processor="ftcore_models._pixtral_processor:PixtralProcessor",
            mark="[IMG]",
            image="[IMG]",
            tokens=TOKENS,
            parts={
                "vision": "vision_tower",
                "language": "language_model",
                "attention": "self_attn|attention",
                "mlp": "mlp|feed_forward",
            },
            image_processor="PixtralImageProcessorPil",
            tiny={"size": {"longest_edge": 64}, "patch_size": 16},
            settings={"patch_size": 16, "spatial_merge_size": 1},
        ),
    )
