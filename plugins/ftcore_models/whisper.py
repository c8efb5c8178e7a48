"""Whisper: speech to text, an encoder of log-mel frames and a decoder (arXiv 2212.04356)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import ModelConfig, ModelFamily, Plan, Role, hookimpl
from ftcore_models._encoder import LEARNED_POSITIONS, own_head
from ftcore_models._features import whisper_features

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

TINY_EN = {
    "vocab_size": 51864,
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
}


@dataclass
class Config(ModelConfig):
    """Whisper's settings."""

    id: str = "openai/whisper-small"
    """Checkpoint id on the Hugging Face hub."""


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Encoder-decoder with LayerNorm before each part, GELU, and a tied head."""
    return ModelFamily(
        model_types=("whisper",),
        roles=(
            Role("layer_norm", "LayerNorm"),
            Role("attention", "WhisperAttention", frozenset({"bidirectional", "no_rope", "own_projection_names"})),
            Role("lm_head", "WhisperForConditionalGeneration", frozenset({"encoder_decoder"})),
        ),
        lora_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        auto_class="AutoModelForSpeechSeq2Seq",
        tiny={
            "vocab_size": 259,  # the byte-level tokenizer's
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_source_positions": 50,  # one second
            "decoder_start_token_id": 257,  # <|im_start|>
            "begin_suppress_tokens": None,
        },
        shapes={"whisper-tiny.en": TINY_EN},
        checkpoints=(
            *(f"openai/whisper-{size}" for size in ("tiny", "base", "small", "medium", "large-v3", "large-v3-turbo")),
            *(f"openai/whisper-{size}.en" for size in ("tiny", "base", "small", "medium")),
        ),
        limits=(
            own_head("use +trainer=speech", "Whisper hears recordings, which text trainers do not have"),
            LEARNED_POSITIONS,
        ),
    )


@hookimpl(wrapper=True)
def ftcore_load_tokenizer(plan: Plan) -> Generator[None, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Saved with the feature extractor, so that every folder loads with transformers' speech pipeline."""
    from ftcore.companions import saved_beside

    tokenizer = yield
    saved_beside(tokenizer, whisper_features(plan).save_pretrained)
    return tokenizer


@hookimpl(wrapper=True)
def ftcore_adapt_model(plan: Plan) -> Generator[None, Any, nn.Module]:
    """The encoder's positions are fixed sinusoids, and stay what they are when all weights are trained."""
    model = yield
    base = getattr(model, "get_base_model", lambda: model)()
    base.model.encoder.embed_positions.requires_grad_(False)
    adapted: nn.Module = model
    return adapted
