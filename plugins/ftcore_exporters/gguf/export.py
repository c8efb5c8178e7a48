"""From the trained model to GGUF files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
from gguf import GGMLQuantizationType as Type

from ftcore import Checkpoint, Problem, Refused
from ftcore.disk import need_space
from ftcore.gguf_facts import Gguf, Value
from ftcore.paths import whole_file
from ftcore.weights import Weight
from ftcore_exporters.gguf.checks import OTHER
from ftcore_exporters.gguf.hyperparameters import (
    add_hyperparameters,
    context_length,
    hyperparameters,
    sliding_window,
    why_not,
)
from ftcore_exporters.gguf.metadata import Names, add_metadata, add_sampling, names_of
from ftcore_exporters.gguf.mixes import FILE_TYPES, Model, size, tensor_types
from ftcore_exporters.gguf.rope import rope_factors
from ftcore_exporters.gguf.tensors import Tensor, tensors_of
from ftcore_exporters.gguf.vocabulary import add_vocabulary
from ftcore_exporters.gguf.writing import write

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

HEADER = 32 * 2**20
"""Room for keys and vocabulary, in bytes: 256,000 tokens with their merges take some 10 MB."""


def write_files(
    checkpoint: Checkpoint, folder: Path, types: Sequence[str], finetune: str | None = None
) -> Iterator[tuple[Path, str]]:
    """Write a file of each type, one after the other, and give its path and a note on it.

    Raises Refused where the disk is too small for all of them, before anything is written, for what llama.cpp cannot
    compute, and for values that do not fit a type.
    """
    plan, facts = checkpoint.plan, checkpoint.plan.family.gguf
    config = checkpoint.config().get_text_config()
    assert facts is not None
    if reason := why_not(config, facts):
        raise Refused(Problem("export.gguf", reason, OTHER))
    factors = [_computed(name, values) for name, values in rope_factors(config).items()]
    tensors = [*factors, *tensors_of(checkpoint.weights(), config, facts)]
    keys = hyperparameters(config, facts)
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    mixes = {kind: tensor_types(kind, shapes, _model(config, keys, facts.arch)) for kind in types}
    needed = sum(size(mix[name], shape) for mix in mixes.values() for name, shape in shapes.items())
    need_space(folder, needed + HEADER * len(types), f"the GGUF of type {', '.join(types)}")
    label = size_label(tensors)
    names = names_of(plan, finetune, sum(math.prod(shape) for shape in shapes.values()))
    for kind in types:
        writer = gguf.GGUFWriter(None, facts.arch)
        add_metadata(writer, plan, names, label, FILE_TYPES[kind][0])
        add_sampling(writer, plan, checkpoint.generation())
        add_hyperparameters(writer, keys, facts.arch)
        add_vocabulary(writer, checkpoint.tokenizer, config, facts)
        target = folder / names.file(label, kind)
        with whole_file(target) as file:
            write(writer, tensors, mixes[kind], file)
        yield target, _note(config, facts, mixes[kind], kind)


def write_adapter(checkpoint: Checkpoint, folder: Path, finetune: str | None = None) -> Path:
    """Write the LoRA adapter alone, and give its path. Raises Refused for what such a file cannot hold."""
    from ftcore_exporters.gguf.lora import write_lora

    names, label = _names(checkpoint, finetune)
    target = folder / names.file(label, "f32", lora=True)
    write_lora(checkpoint, target)
    return target


def write_vision(checkpoint: Checkpoint, folder: Path, finetune: str | None = None) -> Path | None:
    """Write what reads images, in float16, and give its path; None for a model without, or with an unknown tower."""
    from ftcore_exporters.gguf.vision import TOWERS, write_mmproj

    vision = getattr(checkpoint.config(), "vision_config", None)
    if getattr(vision, "model_type", None) not in TOWERS:
        return None
    names, label = _names(checkpoint, finetune)
    target = folder / names.mmproj(label, "f16")
    write_mmproj(checkpoint, target, "f16")
    return target


def _names(checkpoint: Checkpoint, finetune: str | None) -> tuple[Names, str]:
    """Names and size of the merged model."""
    facts = checkpoint.plan.family.gguf
    assert facts is not None
    tensors = tensors_of(checkpoint.weights(), checkpoint.config().get_text_config(), facts)
    names = names_of(checkpoint.plan, finetune, sum(math.prod(tensor.shape) for tensor in tensors))
    return names, size_label(tensors)


def size_label(tensors: Sequence[Tensor]) -> str:
    """The size as the convention has it: `135M`, or `128x2B` for a mixture of experts."""
    import numpy

    writer = gguf.GGUFWriter(None, "")
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, numpy.dtype(numpy.float32), 0)
    return gguf.size_label(*writer.get_total_parameter_count())


def _computed(name: str, values: torch.Tensor) -> Tensor:
    """A tensor that is not among the weights."""
    weight = Weight(tuple(values.shape), values.dtype, lambda start, stop: values[start:stop])
    return Tensor(name, weight.shape, (weight,))


def _model(config: PretrainedConfig, keys: Mapping[str, Value], arch: str) -> Model:
    shared = keys["attention.head_count_kv"]
    first = shared if isinstance(shared, int) else next(iter(shared))  # type: ignore[arg-type]
    experts = keys.get("expert_count", 0)
    assert isinstance(first, int) and isinstance(experts, int)
    sharing = config.num_attention_heads // first if first else 0
    return Model(arch, config.num_hidden_layers, experts, sharing)


def _note(config: PretrainedConfig, facts: Gguf, mix: Mapping[str, Type], kind: str) -> str:
    """The context where it is cut to the window, and the types that stand in for the one that was asked for."""
    said = []
    if context_length(config, facts) < config.max_position_embeddings:
        said.append(f"context of {sliding_window(config)} tokens: llama.cpp has no sliding window for {facts.arch}")
    usual = Counter(found.name for found in mix.values() if found is not Type.F32).most_common(1)
    if usual and usual[0][0] != FILE_TYPES[kind][1].name:
        said.append(f"most tensors are {usual[0][0]}, as llama.cpp has it for rows that do not divide by 256")
    return "; ".join(said)
