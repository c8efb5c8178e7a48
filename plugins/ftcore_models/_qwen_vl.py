"""What Qwen's families with images share: tokens, a chat template, tiny sizes, and why rows are not packed."""

from __future__ import annotations

from typing import Any

from ftcore import Vision
from ftcore_models._packing import no_packing
from ftcore_models._vision import chatml

TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDS = {"vision_start_token_id": 259, "vision_end_token_id": 260, "image_token_id": 261, "video_token_id": 262}
"""Where the tokens stand in the tiny models' byte-level vocabulary."""
TEMPLATE = chatml("<|vision_start|><|image_pad|><|vision_end|>")
"""For tokenizers without a template: Qwen's own, without the system message that it adds."""
PARTS = {"vision": r"visual\.blocks", "language": "language_model", "attention": "self_attn|attn", "mlp": "mlp"}
PACKING = no_packing("positions have three axes, and documents in one row are not told apart by them")

TEXT: dict[str, Any] = {
    "vocab_size": 263,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
"""Language side of a tiny model; the sections of RoPE's axes fill half a head of 16."""
TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
"""Vision side of a tiny model, from Qwen2.5-VL on."""
IMAGES = {"size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}, "temporal_patch_size": 2, "merge_size": 2}


def vision(processor: str, patch: int) -> Vision:
    """How one of the families reads images, with patches of so many pixels.

    :param processor: module and class below `transformers.models`.
    """
    return Vision(
        processor=f"transformers.models.{processor}",
        mark="<|image_pad|>",
        image="<|image_pad|>",
        tokens=TOKENS,
        parts=PARTS,
        image_processor="Qwen2VLImageProcessorPil",
        tiny=IMAGES | {"patch_size": patch},
        token_types="mm_token_type_ids",
    )
