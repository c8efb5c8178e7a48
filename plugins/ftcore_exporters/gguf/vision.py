"""The part of a model that reads images as GGUF: `mmproj-*.gguf`, for `llama-server --mmproj` (llama.cpp's libmtmd)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
from gguf import GGMLQuantizationType as Type

from ftcore import Checkpoint, Problem, Refused
from ftcore.paths import whole_file
from ftcore.vision import processor_of
from ftcore.weights import Weight, Weights
from ftcore_exporters.gguf.tensors import Tensor
from ftcore_exporters.gguf.writing import write

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

OTHER = "use +export=[safetensors]"
IMAGE_SIZE = 560
"""Pixels that llama.cpp tries a model on when it is loaded; images of any size are read."""
TYPES = {"f32": (Type.F32, gguf.LlamaFileType.ALL_F32), "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16)}


def write_mmproj(checkpoint: Checkpoint, path: Path, kind: str = "f16") -> None:
    """Write the vision tower and its projector.

    :param kind: `f16`, or `f32`; vectors are float32 in both.

    Raises Refused for a model whose vision tower is of another kind than those of `TOWERS`.
    """
    config = checkpoint.config()
    vision = getattr(config, "vision_config", None)
    add = TOWERS.get(getattr(vision, "model_type", ""))
    processor = processor_of(checkpoint.tokenizer)
    if add is None or processor is None:
        name = getattr(vision, "model_type", None) or "no vision tower"
        known = ", ".join(TOWERS)
        raise Refused(Problem("export.gguf", f"images are written for {known} only, and this model has {name}", OTHER))
    writer = gguf.GGUFWriter(None, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_name(path.stem)
    writer.add_file_type(TYPES[kind][1])
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config.get_text_config().hidden_size)
    writer.add_vision_image_mean([float(value) for value in processor.image_processor.image_mean])
    writer.add_vision_image_std([float(value) for value in processor.image_processor.image_std])
    tensors = add(writer, config, checkpoint.weights())
    types = {tensor.name: TYPES[kind][0] if len(tensor.shape) > 1 else Type.F32 for tensor in tensors}
    with whole_file(path) as file:
        write(writer, tensors, types, file)


def _qwen2_vl(writer: gguf.GGUFWriter, config: PretrainedConfig, weights: Weights) -> list[Tensor]:
    """Qwen2-VL's tower (arXiv 2409.12191) and the MLP that merges four patches into one token."""
    vision = config.vision_config
    if (vision.temporal_patch_size, vision.hidden_act, vision.spatial_merge_size) != (2, "quick_gelu", 2):
        raise Refused(Problem("export.gguf", "llama.cpp's Qwen2-VL merges 2 frames and 2 x 2 patches", OTHER))
    writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN2VL)
    writer.add_vision_image_size(IMAGE_SIZE)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.embed_dim)
    writer.add_vision_feed_forward_length(int(vision.embed_dim * vision.mlp_ratio))
    writer.add_vision_block_count(vision.depth)
    writer.add_vision_head_count(vision.num_heads)
    writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
    writer.add_vision_attention_layernorm_eps(1e-6)  # as transformers' Qwen2VLVisionBlock has it, in no config
    # The merger's layers 0 and 2 are numbered as blocks are.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, max(vision.depth, 3))
    return [t for name, weight in weights.items() if name.startswith("visual.") for t in _split(name, weight, names)]


def _split(name: str, weight: Weight, names: gguf.TensorNameMap) -> Iterator[Tensor]:
    """Queries, keys and values one by one, and the patches' convolution as one for each of two frames."""
    if name == "visual.patch_embed.proj.weight":
        shape = (*weight.shape[:2], *weight.shape[3:])
        for frame, end in enumerate(("", ".1")):
            yield Tensor(_named(name, names) + end, shape, (weight,), (functools.partial(_frame, frame),))
    elif ".attn.qkv." in name:
        third = weight.shape[0] // 3
        for i, part in enumerate("qkv"):
            piece = _rows(weight, i * third, third)
            yield Tensor(_named(name.replace("qkv", part), names), piece.shape, (piece,))
    else:
        yield Tensor(_named(name, names), weight.shape, (weight,))


def _frame(frame: int, rows: torch.Tensor) -> torch.Tensor:
    return rows[:, :, frame]


def _rows(weight: Weight, first: int, count: int) -> Weight:
    """Some rows of a weight."""

    def read(start: int, stop: int) -> Any:
        return weight.rows(first + start, first + stop)

    return dataclasses.replace(weight, shape=(count, *weight.shape[1:]), read=read)


def _named(published: str, names: gguf.TensorNameMap) -> str:
    name = names.get_name(published, try_suffixes=(".weight", ".bias"))
    if name is None:
        raise Refused(Problem("export.gguf", f"llama.cpp's vision towers have no place for {published}", OTHER))
    return name


TOWERS: Mapping[str, Callable[[gguf.GGUFWriter, PretrainedConfig, Weights], list[Tensor]]] = {
    "qwen2_vl_vision": _qwen2_vl,
}
"""`model_type` of the vision config to what adds its keys and gives its tensors."""
