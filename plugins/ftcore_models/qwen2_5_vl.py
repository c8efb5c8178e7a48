"""Qwen2.5-VL: Qwen2-VL's layers over a vision tower with RMSNorm, SwiGLU and windows."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._llama_like import LORA_TARGETS
from ftcore_models._qwen_vl import IDS, PACKING, TEMPLATE, TEXT, TOWER, vision


@dataclass
class Config(ModelConfig):
    """Qwen2.5-VL's settings."""

    id: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Norms and gated MLPs are the same in the tower as in the decoder, so that their kernels serve both."""
    return ModelFamily(
        model_types=("qwen2_5_vl",),
        roles=(
            Role("rms_norm", "Qwen2_5_VLRMSNorm"),
            Role("mlp", "Qwen2MLP"),
            Role("mlp", "Qwen2_5_VLMLP"),
            Role("attention", "Qwen2_5_VLAttention"),
            Role("lm_head", "Qwen2_5_VLForConditionalGeneration"),
            Role("decoder_layer", "Qwen2_5_VLDecoderLayer", frozenset({"sliding_window"})),
            Role("vision_attention", "Qwen2_5_VLVisionAttention"),
        ),
        lora_targets=(*LORA_TARGETS, "qkv", "proj"),
        tiny={
            "text_config": TEXT,
            "vision_config": TOWER | {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
            **IDS,
        },
        auto_class="AutoModelForImageTextToText",
        chat_template=TEMPLATE,
        checkpoints=tuple(f"Qwen/Qwen2.5-VL-{size}-Instruct" for size in ("3B", "7B", "32B", "72B")),
        chat=Chat(turn_ends=("<|im_end|>",)),
        limits=(PACKING,),
        vision=vision("qwen2_5_vl.processing_qwen2_5_vl:Qwen2_5_VLProcessor", patch=14),
    )
