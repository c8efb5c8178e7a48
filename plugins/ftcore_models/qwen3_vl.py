"""Qwen3-VL, dense: Qwen3's layers with positions of three axes, and features of the tower added between layers."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._llama_like import LORA_TARGETS
from ftcore_models._qwen_vl import IDS, PACKING, TEMPLATE, TEXT, TOWER, vision

# The published 2B, but for the ids of its marks: they are those of the byte-level tokenizer that random weights get.
SHAPES = {
    "qwen3-vl-2b": {
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5000000.0,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        "tie_word_embeddings": True,
        **IDS,
    }
}


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
        shapes=SHAPES,
        auto_class="AutoModelForImageTextToText",
        chat_template=TEMPLATE,
        checkpoints=tuple(
            f"Qwen/Qwen3-VL-{size}-{kind}" for size in ("2B", "4B", "8B", "32B") for kind in ("Instruct", "Thinking")
        ),
        chat=Chat(turn_ends=("<|im_end|>",), thinking=("<think>", "</think>")),
        limits=(PACKING,),
        vision=vision("qwen3_vl.processing_qwen3_vl:Qwen3VLProcessor", patch=16),
    )
