"""Decoder models of every family that the whole-layer kernel covers, small and with random weights."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from ftcore import Kernel, Requirement, Role
from ftcore.device import Device
from ftcore.patching import patch
from ftcore.specs import Phase
from ftcore.testing import maths, runs
from ftcore_kernels.sets._ops import TRITON, kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu")
LEVELS = 5
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,  # as ftcore loads models: a cache is for generation
}
SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Family:
    """A family by the names of its classes, and how its layer departs from Llama's."""

    name: str
    traits: frozenset[str] = frozenset()
    more: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = tuple(SEPARATE)
    config: str = "Config"

    @property
    def role(self) -> Role:
        return Role("decoder_layer", f"{self.name}DecoderLayer", self.traits)


GEMMA = frozenset({"unit_offset", "sandwich_norm", "sliding_window"})
FAMILIES = {
    "llama": Family("Llama"),
    "llama with biases": Family("Llama", more={"attention_bias": True, "mlp_bias": True}),
    "qwen3": Family("Qwen3", frozenset({"qk_norm"})),
    "mistral": Family("Mistral", frozenset({"sliding_window"}), {"sliding_window": 5}),
    "qwen2": Family("Qwen2", frozenset({"sliding_window"})),
    "qwen2 with a window": Family(
        "Qwen2",
        frozenset({"sliding_window"}),
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma2": Family("Gemma2", GEMMA | {"attention_softcap"}, {"sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3": Family("Gemma3", GEMMA | {"qk_norm"}, {"sliding_window": 5}, config="TextConfig"),
    "phi3": Family(
        "Phi3",
        frozenset({"fused_projections", "sliding_window"}),
        {"partial_rotary_factor": 0.5, "hidden_size": 64},
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    ),
}


def build(family: str = "llama", **more: Any) -> Any:
    """A tiny model with random weights, none of them where it started."""
    known = FAMILIES[family]
    config = getattr(transformers, known.name + known.config)(**SIZES | known.more | more)
    if "attention_softcap" in known.traits:
        config._attn_implementation = "eager"  # transformers 5.17 would take SDPA, which leaves the cap out
    torch.manual_seed(0)
    model = getattr(transformers, f"{known.name}ForCausalLM")(config)
    runs.shake(model)
    return model.to(DEVICE).train()


def adapt(model: Any, family: str = "llama", **lora: Any) -> Any:
    """The model under LoRA, with B away from 0: A has no gradient otherwise."""
    options = {"r": 8, "lora_alpha": 16, "target_modules": list(FAMILIES[family].targets), "lora_dropout": 0.0}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options | lora))
    runs.shake(model, trainable_only=True)
    return model.train()


def offered(kernel_set: str) -> list[Kernel]:
    needs = {"triton": TRITON, "reference": Requirement()}[kernel_set]
    return [kernel for kernel in kernels(kernel_set, needs) if kernel.role == "decoder_layer"]


def patched(plain: Any, family: str = "llama", kernel_set: str = "reference") -> Any:
    """A copy of the model whose layers are all claimed."""
    ours = copy.deepcopy(plain)
    report = patch(ours, [FAMILIES[family].role], offered(kernel_set), Device(), Phase.ADAPTED)
    number = plain.config.num_hidden_layers
    assert report.counts() == {("decoder_layer", f"{kernel_set}.decoder_layer"): number}
    assert not report.skipped
    return ours


def pair(family: str = "llama", kernel_set: str = "reference", lora: Any = None, **more: Any) -> tuple[Any, Any]:
    """The same model untouched and claimed, under LoRA unless `lora` is False."""
    plain = build(family, **more)
    if lora is not False:
        plain = adapt(plain, family, **(lora or {}))
    return plain, patched(plain, family, kernel_set)


def base(model: Any) -> Any:
    """The transformers model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def layers(model: Any) -> list[Any]:
    return list(base(model).model.layers)


def keep(model: Any, level: int) -> None:
    for layer in layers(model):
        layer.ftcore_recompute.choose = lambda rows, length: level


def batch(rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


@contextlib.contextmanager
def own_forwards(model: Any) -> Iterator[list[str]]:
    """The calls of the family's own forward of a layer, while this is open."""
    cls, calls = type(layers(model)[0]), []
    own: Callable[..., Any] = cls.forward

    def counted(self, *args, **kwargs):
        calls.append(cls.__name__)
        return own(self, *args, **kwargs)

    cls.forward = counted
    try:
        yield calls
    finally:
        cls.forward = own


def manual(model: Any, data: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients, computed without the family's own forward."""
    with own_forwards(model) as calls:
        result = maths.loss_and_gradients(model, data)
    assert not calls, "the layer fell back on the family's own forward"
    return result
