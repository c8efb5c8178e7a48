"""Qwen2-VL's vision tower and projector as GGUF, in real llama.cpp (libmtmd): images become the same tokens."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy
import PIL.Image
import pytest
import torch
from test_gguf_architectures import exported, folder_of

from ftcore import Checkpoint
from ftcore.errors import Refused
from ftcore.llama_cpp import LlamaCpp
from ftcore.testing import runs
from ftcore.vision import processor_of
from ftcore_exporters.gguf.hyperparameters import add_hyperparameters, hyperparameters
from ftcore_exporters.gguf.tensors import tensors_of
from ftcore_exporters.gguf.vision import write_mmproj
from ftcore_exporters.gguf.vocabulary import add_vocabulary
from ftcore_exporters.gguf.writing import write

WIDTH, HEIGHT = 84, 112
"""3 x 4 tokens: both sides divide by 28, so that neither side resizes."""
QUESTION = "What is it?"


def checkpoint_of(name: str, tmp: Path, *overrides: str) -> Checkpoint:
    """A tiny random model with weights away from where they start."""
    loaded = runs.loaded(
        [f"+model={name}", "model.tiny=true", "model.dtype=float32", f"output_dir='{tmp / 'run'}'", *overrides]
    )
    runs.shake(loaded.model)
    return Checkpoint(model=loaded.model, tokenizer=loaded.tokenizer, plan=loaded.plan)


def text_file(checkpoint: Checkpoint, file: Path) -> Path:
    """The language side in float32."""
    facts, config = checkpoint.plan.family.gguf, checkpoint.config().get_text_config()
    assert facts is not None
    tensors = tensors_of(checkpoint.weights(), config, facts)
    writer = gguf.GGUFWriter(None, facts.arch)
    add_hyperparameters(writer, hyperparameters(config, facts), facts.arch)
    add_vocabulary(writer, checkpoint.tokenizer, config, facts)  # type: ignore[arg-type]
    write(writer, tensors, {tensor.name: gguf.GGMLQuantizationType.F32 for tensor in tensors}, file)
    return file


def image() -> Any:
    """Noise over a slope of colours."""
    slope = numpy.linspace(0, 160, WIDTH * HEIGHT * 3).reshape(HEIGHT, WIDTH, 3)
    noise = numpy.random.default_rng(0).integers(0, 90, (HEIGHT, WIDTH, 3))
    return PIL.Image.fromarray((slope + noise).astype(numpy.uint8))


def seen_by_llama_cpp(text: Path, projector: Path, tmp: Path) -> dict[str, Any]:
    """What libmtmd makes of the image, and the logits after the question."""
    (tmp / "pixels").write_bytes(image().tobytes())
    words = [text, projector, tmp / "pixels", WIDTH, HEIGHT, QUESTION]
    command = [sys.executable, str(Path(__file__).parent / "mtmd_worker.py"), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def without_epsilon(checkpoint: Checkpoint) -> Any:
    """The model with norms as llama.cpp has them for `qwen2vl`: it does not read the file's epsilon, and takes 0.

    (`llama_model_qwen2vl::load_arch_hparams`, b11434.) Real checkpoints have 1e-6, far below their hidden values.
    """
    base: Any = checkpoint.base()
    config = copy.deepcopy(base.config)
    config.text_config.rms_norm_eps = 0.0
    model = type(base)(config)
    model.load_state_dict(base.state_dict())
    return model.eval()


def seen_by_transformers(checkpoint: Checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """The image's tokens `[tokens, hidden]`, and the logits after the question `[vocab]`."""
    model = without_epsilon(checkpoint)
    asked = f"<|vision_start|><|image_pad|><|vision_end|>{QUESTION}"
    inputs = processor_of(checkpoint.tokenizer)(images=[image()], text=[asked], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        tokens = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return getattr(tokens, "pooler_output", tokens), logits


def compared(checkpoint: Checkpoint, text: Path, projector: Path, tmp: Path) -> tuple[float, float]:
    """How far apart the image's tokens are, and the logits after the question."""
    found = seen_by_llama_cpp(text, projector, tmp)
    tokens, logits = seen_by_transformers(checkpoint)
    assert found["tokens"] == len(tokens) == 12
    assert tokens.std() > 0.1
    assert logits.std() > 0.1
    apart = (torch.tensor(found["values"]).view_as(tokens) - tokens).abs().max()
    behind = (torch.tensor(found["logits"]) - logits).abs().max()
    print(f"image tokens {apart:.2e} apart (largest {tokens.abs().max():.2f}), logits {behind:.2e}")
    return float(apart), float(behind)


def test_images_are_the_same_tokens_in_llama_cpp(tmp_path: Path) -> None:
    """The projector's output and the logits behind it; llama.cpp's own GELU is by a table of float16 numbers."""
    checkpoint = checkpoint_of("qwen2_vl", tmp_path, "adapter=full")
    write_mmproj(checkpoint, tmp_path / "mmproj.gguf", "f32")
    text = text_file(checkpoint, tmp_path / "text.gguf")
    assert max(compared(checkpoint, text, tmp_path / "mmproj.gguf", tmp_path)) <= 1e-3


def test_the_exporter_writes_both_files(tmp_path: Path) -> None:
    """The text and, in float16, what reads images; together they are the model."""
    folder = folder_of("qwen2_vl", {}, tmp_path / "model")
    text, images = exported("qwen2_vl", folder, tmp_path / "run", "export.gguf.types=[f32]")
    assert images.path.name.startswith("mmproj-")
    loaded = runs.loaded(
        [
            "+model=qwen2_vl",
            f"model.path='{folder}'",
            "model.dtype=float32",
            "adapter=full",
            f"output_dir='{tmp_path}/r'",
        ]
    )
    checkpoint = Checkpoint(model=loaded.model, tokenizer=loaded.tokenizer, plan=loaded.plan)
    assert max(compared(checkpoint, text.path, images.path, tmp_path)) <= 2e-3


def test_text_alone_is_the_same(tmp_path: Path) -> None:
    """M-RoPE (`qwen2vl`) on text: all axes of a position are one."""
    checkpoint = checkpoint_of("qwen2_vl", tmp_path, "adapter=full")
    ids = torch.randint(0, 256, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        wanted = without_epsilon(checkpoint)(input_ids=torch.tensor([ids])).logits[0]
    with LlamaCpp(text_file(checkpoint, tmp_path / "text.gguf")) as consumer:
        assert (consumer.logits(ids) - wanted).abs().max() <= 1e-4


def test_an_adapter_is_merged_into_the_tower(tmp_path: Path) -> None:
    """LoRA on the tower's layers is in the file: queries, keys and values are cut out of the merged rows."""
    checkpoint = checkpoint_of("qwen2_vl", tmp_path)
    write_mmproj(checkpoint, tmp_path / "mmproj.gguf", "f32")
    read = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(tmp_path / "mmproj.gguf").tensors}
    layer: Any = checkpoint.base().model.visual.blocks[1].attn.qkv
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    found = torch.cat([read[f"v.blk.1.attn_{part}.weight"] for part in "qkv"])
    assert layer.get_delta_weight("default").abs().max() > 1e-3
    torch.testing.assert_close(found, merged.detach(), rtol=0, atol=1e-6)


def test_keys(tmp_path: Path) -> None:
    """What libmtmd asks for."""
    checkpoint = checkpoint_of("qwen2_vl", tmp_path, "adapter=full")
    write_mmproj(checkpoint, tmp_path / "mmproj.gguf")
    fields = gguf.GGUFReader(tmp_path / "mmproj.gguf").fields
    wanted = {
        "general.type": "mmproj",
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "qwen2vl_merger",
        "clip.vision.projection_dim": 64,
        "clip.vision.embedding_length": 32,
        "clip.vision.feed_forward_length": 64,
        "clip.vision.block_count": 2,
        "clip.vision.attention.head_count": 2,
        "clip.vision.patch_size": 14,
    }
    assert {key: fields[key].contents() for key in wanted} == wanted
    images = processor_of(checkpoint.tokenizer).image_processor
    assert fields["clip.vision.image_mean"].contents() == pytest.approx(images.image_mean)


@pytest.mark.parametrize(
    ("name", "said"), [("llama", "no vision tower"), ("qwen2_5_vl", "qwen2_5_vl_vision|qwen2_5_vl")]
)
def test_other_towers_are_refused(name: str, said: str, tmp_path: Path) -> None:
    """And nothing is written."""
    with pytest.raises(Refused, match=said):
        write_mmproj(checkpoint_of(name, tmp_path), tmp_path / "mmproj.gguf")
    assert not list(tmp_path.glob("*.gguf"))
