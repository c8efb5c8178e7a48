"""How a speech model takes recordings: its feature extractor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftcore import Plan, checkpoint

if TYPE_CHECKING:
    from transformers import EncodecFeatureExtractor, WhisperFeatureExtractor

RATE = 16_000
"""Samples a second of Whisper's recordings."""
HOP = 160
"""Samples from one frame to the next."""
SOURCE_POSITIONS = 1500
"""Positions of the encoder, each of two frames, in every published checkpoint: 30 seconds."""


def whisper_features(plan: Plan) -> WhisperFeatureExtractor:
    """The checkpoint's own, or, where it brings none, one made from the model's config."""
    from transformers import AutoConfig, WhisperFeatureExtractor

    assert plan.run.model is not None
    place, revision = checkpoint.locate(plan.run.model, plan.family), plan.run.model.revision
    try:
        own: WhisperFeatureExtractor = WhisperFeatureExtractor.from_pretrained(place, revision=revision)
        return own
    except OSError:  # no preprocessor_config.json
        config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
        return WhisperFeatureExtractor(
            feature_size=config.num_mel_bins, chunk_length=window(config.to_dict()), hop_length=HOP, sampling_rate=RATE
        )


def window(settings: dict[str, Any]) -> int:
    """Seconds that the encoder hears at once."""
    return int(settings.get("max_source_positions", SOURCE_POSITIONS)) * 2 * HOP // RATE


def codec_features(plan: Plan) -> EncodecFeatureExtractor:
    """That of a codec such as Mimi: the checkpoint's own, or one for a single channel at its codec's rate."""
    from transformers import AutoConfig, EncodecFeatureExtractor

    assert plan.run.model is not None
    place, revision = checkpoint.locate(plan.run.model, plan.family), plan.run.model.revision
    try:
        own: EncodecFeatureExtractor = EncodecFeatureExtractor.from_pretrained(place, revision=revision)
        return own
    except OSError:  # no preprocessor_config.json
        codec = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False).codec_config
        return EncodecFeatureExtractor(feature_size=1, sampling_rate=codec.sampling_rate)
