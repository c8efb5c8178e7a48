"""Qwen3-VL, dense: Qwen3's layers with positions of three axes, and features of the tower added between layers."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._llama_like import LORA_TARGETS
from ftcore_models._qwen_vl import IDS, PACKING, TEMPLATE, TEXT, TOWER, vision


@dataclass
class Config(ModelConfig):
    """Qwen3-VL's settings."""

    id: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """The tower's features (DeepStack) are added to what a layer returns, outside of it: its kernels stay exact."""
    return ModelFamily(
        model_types=("qwen3_vl",),
        roles=(
            Role("rms_norm", "Qwen3VLTextRMSNorm"),
            Role("mlp", "Qwen3VLTextMLP"),
            Role("attention", "Qwen3VLTextAttention", frozenset({"qk_norm"})),
            Role("lm_head", "Qwen3VLForConditionalGeneration"),
            Role("decoder_layer", "Qwen3VLTextDecoderLayer", frozenset({"qk_norm"})),
            Role("layer_norm", "LayerNorm"),
            Role("vision_attention", "Qwen3VLVisionAttention"),
        ),
        lora_targets=(*LORA_TARGETS, "qkv", "proj", "linear_fc1", "linear_fc2"),
        tiny={
            "text_config": {name: value for name, value in TEXT.items() if name != "bos_token_id"}
            | {"head_dim": 16, "rope_parameters": {**TEXT["rope_parameters"], "mrope_interleaved": True}},
            "vision_config": TOWER | {"patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
            **IDS,
        },
        auto_class="AutoModelForImageTextToText",
        chat_template=TEMPLATE,
        checkpoints=tuple(
            f"Qwen/Qwen3-VL-{size}-{kind}" for size in ("2B", "4B", "8B", "32B") for kind in ("Instruct", "Thinking")
        ),
        chat=Chat(turn_ends=("<|im_end|>",), thinking=("<think>", "</think>")),
        limits=(PACKING,),
        vision=vision("qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor", patch=16),
    )
