"""Sesame CSM: text to speech, a backbone that writes Mimi's first codebook and a depth decoder that writes the rest."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftcore import Limit, ModelConfig, ModelFamily, Plan, Role, hookimpl
from ftcore.defaults import model as core
from ftcore_models._llama_like import LORA_TARGETS, TINY

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WAVEFORM = "AutoModelForTextToWaveform"
AUDIO, AUDIO_END = "<|AUDIO|>", "<|audio_eos|>"
HEADS = frozenset({"codebook_heads"})
CODEBOOKS = 4
TINY_CODEC = {
    "model_type": "mimi",
    "hidden_size": 32,
    "num_filters": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "codebook_size": 256,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": CODEBOOKS,
    "upsample_groups": 32,
    "sliding_window": 20,
}
TEMPLATE = (
    "{% for message in messages %}{{ bos_token or '' }}[{{ message['role'] }}]{{ message['content'][0]['text'] }}"
    "{{ eos_token }}{% if message['content'] | length > 1 %}" + AUDIO + AUDIO_END + "{% endif %}{% endfor %}"
)
"""One utterance after the other: who speaks, a number, the words, and the recording."""


@dataclass
class Config(ModelConfig):
    """CSM's settings."""

    id: str = "sesame/csm-1b"
    """Checkpoint id on the Hugging Face hub."""


def _other_trainer(plan: Plan) -> bool:
    return plan.trainer is not None and plan.trainer.auto_class != WAVEFORM


def _new_tokens(plan: Plan) -> bool:
    return plan.run.model is not None and bool(plan.run.model.new_tokens)


@hookimpl
def ftcore_model_family() -> ModelFamily:
    """Two decoders of Llama's layers, tied embeddings of the codebooks, and a codec that stays as it is."""
    return ModelFamily(
        model_types=("csm",),
        roles=(
            Role("rms_norm", "CsmRMSNorm"),
            Role("mlp", "CsmMLP"),
            Role("attention", "CsmAttention"),
            Role("lm_head", "CsmForConditionalGeneration", HEADS),
            Role("lm_head", "CsmDepthDecoderForCausalLM", HEADS),
            Role("decoder_layer", "CsmDecoderLayer", frozenset({"two_decoders"})),
            Role("codec", "MimiModel"),
        ),
        lora_targets=LORA_TARGETS,
        auto_class=WAVEFORM,
        tiny=TINY
        | {
            "vocab_size": 259,  # 256 codes, and what begins, ends and pads them
            "text_vocab_size": 261,
            "num_codebooks": CODEBOOKS,
            "codebook_pad_token_id": 258,
            "codebook_eos_token_id": 0,
            "audio_token_id": 259,
            "audio_eos_token_id": 260,
            "bos_token_id": None,
            "pad_token_id": 256,
            "depth_decoder_config": TINY
            | {
                "vocab_size": 259,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_codebooks": CODEBOOKS,
                "backbone_hidden_size": 64,
                "max_position_embeddings": CODEBOOKS + 1,
            },
            "codec_config": TINY_CODEC,
        },
        chat_template=TEMPLATE,
        checkpoints=("sesame/csm-1b",),
        sampling={"speech": {"temperature": 0.9, "top_k": 50}},
        frozen=("codec_model",),
        limits=(
            Limit(
                key="trainer",
                reason="CSM speaks in the codes of recordings, which text trainers do not have",
                fix="use +trainer=tts",
                applies=_other_trainer,
            ),
            Limit(
                key="model.new_tokens",
                reason="its words have an embedding of their own, which does not grow",
                fix="leave it out",
                applies=_new_tokens,
            ),
        ),
    )


@hookimpl(wrapper=True)
def ftcore_load_tokenizer(plan: Plan) -> Generator[None, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Saved with the feature extractor, so that every folder loads with transformers' processor."""
    from ftcore.companions import saved_beside
    from ftcore_models._features import codec_features

    tokenizer = yield
    tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO, AUDIO_END]}, replace_extra_special_tokens=False)
    saved_beside(tokenizer, codec_features(plan).save_pretrained)
    return tokenizer


@hookimpl
def ftcore_load_model(plan: Plan, quantization: Any) -> PreTrainedModel:
    """The codec keeps 32 bits, here and in merged folders: rounded, it would hear other codes."""
    import torch

    assert plan.run.model is not None
    if hasattr(quantization, "llm_int8_skip_modules"):
        skipped = quantization.llm_int8_skip_modules or ["lm_head"]
        quantization.llm_int8_skip_modules = [*skipped, *plan.family.frozen]
    whole = replace(plan, run=replace(plan.run, model=replace(plan.run.model, dtype="float32")))
    model: Any = core.ftcore_load_model(plan=whole, quantization=quantization)
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not name.startswith("codec_model."):
            weight.data = weight.data.to(getattr(torch, plan.dtype))
    model.config.dtype = getattr(torch, plan.dtype)
    model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), *plan.family.frozen}
    if plan.run.model.tiny:
        scatter(model.codec_model)
    _mend(model)
    loaded: PreTrainedModel = model
    return loaded


def _mend(model: Any) -> None:
    """Take what fails, or is lost, in transformers (5.23) off this one model."""
    model.depth_decoder.register_forward_pre_hook(_with_mask, with_kwargs=True)
    # It would make the output of the depth decoder's embedding a leaf, which transformers' CSM then writes into; and
    # `memory` recomputes in the way that needs no gradient of the inputs.
    vars(model)["enable_input_require_grads"] = _nothing
    # Loading takes the depth decoder's settings out of the one file that a merged folder is written from.
    for name, value in model.depth_decoder.generation_config.to_diff_dict().items():
        if name != "transformers_version" and not name.startswith("_"):
            setattr(model.generation_config, f"depth_decoder_{name}", value)


def _nothing() -> None:
    """In the place of a method."""


def _with_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A mask of ones where there are as many frames as codebooks: their positions would be taken for other ones."""
    ids = kwargs.get("input_ids")
    if ids is not None and ids.shape[0] == ids.shape[1] and kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = ids.new_ones(ids.shape)
    return args, kwargs


def scatter(codec: nn.Module) -> None:
    """Fill a random codec's codebooks, which start as zeros: every recording would have the same codes."""
    import torch

    drawn = torch.Generator().manual_seed(4)
    for name, values in codec.named_buffers():
        if name.endswith("codebook.embed_sum") and not values.any():
            values.copy_(torch.randn(values.shape, generator=drawn) * 0.01)
