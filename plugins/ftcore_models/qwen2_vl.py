"""Qwen2-VL: Qwen2's layers with positions of three axes (M-RoPE), and a vision tower that takes images of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftcore import Chat, ModelConfig, ModelFamily, Role, hookimpl
from ftcore.gguf_facts import Gguf, Value
from ftcore_models._llama_like import LORA_TARGETS
from ftcore_models._qwen_vl import IDS, PACKING, TEMPLATE, TEXT, vision

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass
class Config(ModelConfig):
    """Qwen2-VL's settings."""

    id: str = "Qwen/Qwen2-VL-2B-Instruct"
    """Checkpoint id on the Hugging Face hub."""


def _gguf_keys(config: PretrainedConfig) -> dict[str, Value]:
    """Pairs of a head's half that turn with time, height and width; llama.cpp has room for a fourth axis."""
    return {"rope.dimension_sections": [*config.rope_parameters["mrope_section"], 0]}


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """The model makes one table of angles of the positions of three axes, so that RoPE's kernels are exact."""
    return ModelFamily(
        model_types=("qwen2_vl",),
        roles=(
            Role("rms_norm", "Qwen2VLRMSNorm"),
            Role("mlp", "Qwen2MLP"),
            Role("attention", "Qwen2VLAttention"),
            Role("lm_head", "Qwen2VLForConditionalGeneration"),
            Role("decoder_layer", "Qwen2VLDecoderLayer", frozenset({"sliding_window"})),
            Role("layer_norm", "LayerNorm"),
            Role("vision_attention", "VisionAttention"),
        ),
        lora_targets=(*LORA_TARGETS, "qkv", "proj", "fc1", "fc2"),
        tiny={
            "text_config": TEXT,
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "mlp_ratio": 2,
                "num_heads": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
            **IDS,
        },
        auto_class="AutoModelForImageTextToText",
        chat_template=TEMPLATE,
        checkpoints=tuple(f"Qwen/Qwen2-VL-{size}-Instruct" for size in ("2B", "7B", "72B")),
        chat=Chat(turn_ends=("<|im_end|>",)),
        limits=(PACKING,),
        vision=vision("qwen2_vl.processing_qwen2_vl:Qwen2VLProcessor", patch=14),
        gguf=Gguf(arch="qwen2vl", biases=True, apart=("visual.",), keys=_gguf_keys),
    )
