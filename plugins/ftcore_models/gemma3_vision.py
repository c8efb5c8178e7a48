"""Gemma 3 with vision (4B, 12B, 27B): Gemma 3's decoder, and SigLIP's tower, whose images see both ways."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ftcore import Chat, ModelConfig, ModelFamily, Role, Vision, hookimpl
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models._vision import chatml
from ftcore_models.gemma3 import GGUF, OFFSET, SAMPLING

TOKENS = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}


@dataclass
class Config(ModelConfig):
    """Gemma 3's settings."""

    id: str = "google/gemma-3-4b-it"
    """Checkpoint id on the Hugging Face hub; one of the sizes with vision."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Tokens of an image see one another both ways; the mask says so, and the decoder's kernels read it."""
    return ModelFamily(
        model_types=("gemma3",),
        roles=(
            Role("rms_norm", "Gemma3RMSNorm", OFFSET),
            Role("mlp", "Gemma3MLP", frozenset({"geglu"})),
            Role("attention", "Gemma3Attention", frozenset({"qk_norm"})),
            Role("lm_head", "Gemma3ForConditionalGeneration"),
            Role("decoder_layer", "Gemma3DecoderLayer", OFFSET | {"sandwich_norm", "qk_norm", "sliding_window"}),
            Role("layer_norm", "LayerNorm"),
            Role("vision_attention", "SiglipAttention"),
            Role("vision_mlp", "SiglipMLP"),
        ),
        lora_targets=(*LORA_TARGETS, "out_proj", "fc1", "fc2"),
        tiny={
            "text_config": TINY
            | {
                "vocab_size": 262,
                "query_pre_attn_scalar": 24,  # not the heads' width, so that a mistake in the scale shows
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "bos_token_id": None,
                "eos_token_id": 258,
                "pad_token_id": 256,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 7,
                "vision_use_head": False,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 259,
            "image_token_index": 260,
            "eoi_token_index": 261,
        },
        auto_class="AutoModelForImageTextToText",
        chat_template=chatml("<start_of_image>"),
        checkpoints=tuple(f"google/gemma-3-{size}-{kind}" for size in ("4b", "12b", "27b") for kind in ("it", "pt")),
        chat=Chat(turn_ends=("<end_of_turn>",)),
        sampling=SAMPLING,
        vision=Vision(
            processor="transformers.models.gemma3.processing_gemma3:Gemma3Processor",
            mark="<start_of_image>",
            image="<image_soft_token>",
            tokens=tuple(TOKENS.values()),
            names=TOKENS,
            parts={
                "vision": "vision_tower",
                "language": "language_model",
                "attention": "self_attn",
                "mlp": "mlp",
            },
            image_processor="Gemma3ImageProcessorPil",
            tiny={"size": {"height": 28, "width": 28}},
            settings={"image_seq_length": 4},
            token_types="token_type_ids",
        ),
        gguf=replace(GGUF, part="language_model."),
    )
