"""The keys `{arch}.*`: what llama.cpp builds the network from, out of the transformers config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf import GGUFValueType as Kind
from gguf import GGUFWriter

from ftcore.gguf_facts import Gguf, Value
from ftcore_exporters.gguf.rope import check_rope, rope_keys
from ftcore_exporters.gguf.tensors import head_dim

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def hyperparameters(config: PretrainedConfig, facts: Gguf) -> dict[str, Value]:
    """Keys after `{arch}.` to values.

    :param config: That of the decoder.
    """
    width = head_dim(config)
    keys: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": context_length(config, facts),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", None) or config.norm_eps),
    }
    keys |= rope_keys(config, facts, width)
    if facts.keys is not None:
        keys |= facts.keys(config)
    return keys


def add_hyperparameters(writer: GGUFWriter, keys: dict[str, Value], arch: str) -> None:
    """Write them under `{arch}.`."""
    for key, value in keys.items():
        writer.add_key_value(f"{arch}.{key}", value, _kind(value))


def context_length(config: PretrainedConfig, facts: Gguf) -> int:
    """Tokens of the context; no more than the window where llama.cpp would look past it."""
    length: int = config.max_position_embeddings
    window = sliding_window(config)
    return length if window is None or facts.window is not None else min(length, window)


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that the layers with a window see; None where no layer has one."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    windowed = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return window if windowed else None


def why_not(config: PretrainedConfig, facts: Gguf) -> str | None:
    """Why llama.cpp could not compute what this config says, or None where it can."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation is not None and activation not in facts.activations:
        return f"llama.cpp's {facts.arch} has no activation '{activation}'"
    checks = (check_rope(config, facts), facts.window and facts.window(config), facts.refuses and facts.refuses(config))
    return next((reason for reason in checks if reason), None)


def _kind(value: Value) -> Kind:
    if isinstance(value, bool):
        return Kind.BOOL
    if isinstance(value, int):
        return Kind.UINT32
    if isinstance(value, float):
        return Kind.FLOAT32
    return Kind.STRING if isinstance(value, str) else Kind.ARRAY
