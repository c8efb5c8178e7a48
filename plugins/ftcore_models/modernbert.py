"""ModernBERT: an encoder with RoPE, GeGLU, and a sliding window in two layers of three (arXiv 2412.13663)."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._encoder import ENCODER

FUSED = frozenset({"fused_projections", "own_projection_names"})

SHAPES = {
    "modernbert-base": {
        "vocab_size": 50368,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_hidden_layers": 22,
        "num_attention_heads": 12,
        "max_position_embeddings": 8192,
    }
}


@dataclass
class Config(ModelConfig):
    """ModernBERT's settings."""

    id: str = "answerdotai/ModernBERT-base"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Pre-norm encoder with fused projections; every third layer sees the whole row."""
    return ModelFamily(
        model_types=("modernbert",),
        roles=(
            Role("layer_norm", "LayerNorm"),
            Role("mlp", "ModernBertMLP", FUSED | {"geglu"}),
            Role("attention", "ModernBertAttention", FUSED | {"bidirectional", "sliding_window"}),
        ),
        lora_targets=("Wqkv", "Wo", "Wi", "dense"),
        auto_class="AutoModelForMaskedLM",
        tiny={
            "vocab_size": 259,  # the byte-level tokenizer's
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 2048,
            "local_attention": 8,
            "pad_token_id": 256,
            "cls_token_id": None,
            "sep_token_id": None,
        },
        shapes=SHAPES,
        checkpoints=(
            "answerdotai/ModernBERT-base",
            "answerdotai/ModernBERT-large",
            "nomic-ai/modernbert-embed-base",
        ),
        limits=(ENCODER,),
    )
