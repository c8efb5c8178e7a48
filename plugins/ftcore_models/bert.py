"""BERT and the sentence encoders made of it, such as MiniLM: classification and embeddings."""

from __future__ import annotations

from dataclasses import dataclass

from ftcore import ModelConfig, ModelFamily, Role, hookimpl
from ftcore_models._encoder import ENCODER, LEARNED_POSITIONS

SHAPES = {
    "bert-base": {
        "vocab_size": 30522,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 512,
    }
}


@dataclass
class Config(ModelConfig):
    """BERT's settings."""

    id: str = "google-bert/bert-base-uncased"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Encoder with learned positions, LayerNorm after each part, and GELU."""
    return ModelFamily(
        model_types=("bert",),
        roles=(
            Role("layer_norm", "LayerNorm"),
            Role("mlp", "BertIntermediate", frozenset({"ungated_mlp"})),
            Role("attention", "BertAttention", frozenset({"bidirectional", "no_rope"})),
        ),
        lora_targets=("query", "key", "value", "dense"),
        auto_class="AutoModelForMaskedLM",
        tiny={
            "vocab_size": 259,  # the byte-level tokenizer's
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        shapes=SHAPES,
        checkpoints=(
            *(f"google-bert/bert-{size}-{case}" for size in ("base", "large") for case in ("uncased", "cased")),
            "google-bert/bert-base-multilingual-cased",
            "sentence-transformers/all-MiniLM-L6-v2",
            "intfloat/e5-small-v2",
            "thenlper/gte-small",
        ),
        limits=(ENCODER, LEARNED_POSITIONS),
    )
