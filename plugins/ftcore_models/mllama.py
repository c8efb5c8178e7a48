"""Llama 3.2 Vision (11B, 90B): Llama's layers, and layers between them that attend to the tiles of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftcore import Chat, ModelConfig, ModelFamily, Role, Vision, hookimpl
from ftcore_models._llama_like import LORA_TARGETS, TINY
from ftcore_models._vision import chatml

TOKENS = {"bos_token": "<|begin_of_text|>", "image_token": "<|image|>"}
OTHER_NAMES = frozenset({"other_dropout_name"})


@dataclass
class Config(ModelConfig):
    """Llama 3.2 Vision's settings."""

    id: str = "meta-llama/Llama-3.2-11B-Vision-Instruct"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Norms and MLPs are Llama's in both kinds of layers; a layer that attends to images has gates of its own."""
    return ModelFamily(
        model_types=("mllama",),
        roles=(
            Role("rms_norm", "MllamaTextRMSNorm"),
            Role("mlp", "MllamaTextMLP"),
            Role("attention", "MllamaTextSelfAttention", OTHER_NAMES),
            Role("lm_head", "MllamaForConditionalGeneration"),
            Role("decoder_layer", "MllamaSelfAttentionDecoderLayer", OTHER_NAMES),
            Role("cross_attention", "MllamaTextCrossAttention"),
            Role("layer_norm", "LayerNorm"),
            Role("vision_attention", "MllamaVisionAttention"),
            Role("vision_mlp", "MllamaVisionMLP"),
        ),
        lora_targets=(*LORA_TARGETS, "fc1", "fc2"),
        tiny={
            "text_config": {name: value for name, value in TINY.items() if name != "head_dim"}
            | {
                "vocab_size": 260,
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "bos_token_id": 259,
                "eos_token_id": 258,
                "pad_token_id": 256,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
            },
            "image_token_index": 260,  # past the vocabulary of the head, as in the published checkpoints
        },
        auto_class="AutoModelForImageTextToText",
        chat_template=chatml("<|image|>", begin="{{ bos_token }}"),
        checkpoints=tuple(
            f"meta-llama/Llama-3.2-{size}-Vision{kind}" for size in ("11B", "90B") for kind in ("-Instruct", "")
        ),
        chat=Chat(turn_ends=("<|eot_id|>", "<|eom_id|>")),
        sampling={"instruct": {"temperature": 0.6, "top_p": 0.9}},
        vision=Vision(
            processor="transformers.models.mllama.processing_mllama:MllamaProcessor",
            mark="<|image|>",
            image="<|image|>",
            tokens=tuple(TOKENS.values()),
            names=TOKENS,
            parts={
                "vision": "vision_model",
                "language": "language_model",
                "attention": "self_attn|cross_attn",
                "mlp": "mlp",
            },
            image_processor="MllamaImageProcessorPil",
            tiny={"size": {"height": 28, "width": 28}, "max_image_tiles": 4},
            expands=False,
            inputs="ftcore_models.mllama:inputs",
        ),
    )


def inputs(processor: Any, images: Sequence[Sequence[Any]], ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Tiles of each row's images, and which of them each token sees: those of images before it, up to the next."""
    import torch
    from transformers.models.mllama import processing_mllama as own

    made = dict(processor.image_processor(images=[list(row) for row in images], return_tensors="pt"))
    mask = own.convert_sparse_cross_attention_mask_to_dense(
        [own.get_cross_attention_token_mask(list(row), processor.image_token_id) for row in ids],
        num_tiles=made.pop("num_tiles"),
        max_num_tiles=processor.image_processor.max_image_tiles,
        length=max(map(len, ids)),
    )
    return made | {"cross_attention_mask": torch.from_numpy(mask)}
