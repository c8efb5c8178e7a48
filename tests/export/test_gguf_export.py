"""GGUF files as a run writes them: names, metadata, several types, and what is refused."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_gguf_architectures import exported, folder_of

from ftcore import Refused, pipeline
from ftcore.errors import Exit
from ftcore.llama_cpp import LlamaCpp
from ftcore.testing import runs
from ftcore_exporters.gguf.metadata import Names

# ggml's docs/gguf.md, "GGUF Naming Convention".
NAME = re.compile(
    r"^(?P<BaseName>[A-Za-z0-9\s]*(?:(?:-(?:(?:[A-Za-z\s][A-Za-z0-9\s]*)|(?:[0-9\s]*)))*))"
    r"-(?:(?P<SizeLabel>(?:\d+x)?(?:\d+\.)?\d+[A-Za-z](?:-[A-Za-z]+(\d+\.)?\d+[A-Za-z]+)?)"
    r"(?:-(?P<FineTune>[A-Za-z0-9\s-]+))?)?"
    r"-(?:(?P<Version>v\d+(?:\.\d+)*))(?:-(?P<Encoding>(?!LoRA|vocab)[\w_]+))?"
    r"(?:-(?P<Type>LoRA|vocab))?(?:-(?P<Shard>\d{5}-of-\d{5}))?\.gguf$"
)


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize(
    ("base", "finetune", "size", "kind"),
    [
        ("SmolLM2", "smollm2-sft-001", "135M", "q4_k_m"),
        ("Qwen2.5", "a run", "0.5B", "f32"),
        ("Phi-3-mini-4k", "../../etc/passwd", "3.8B", "bf16"),
        ("Llama-3.2", "..", "1.2B", "q8_0"),
        ("Qwen3", "émigré/été", "128x2B", "q2_k"),
        ("", "-v2.0-", "84K", "q5_k_s"),
    ],
)
def test_file_names_follow_the_convention(base: str, finetune: str, size: str, kind: str) -> None:
    """They match ggml's own expression, with each part where it belongs, and name no other folder."""
    name = Names(base, None, base, finetune).file(size, kind)
    found = NAME.match(name)
    assert found is not None, name
    assert found["SizeLabel"] == size
    assert found["Encoding"] == kind.upper()
    assert found["Version"] == "v1.0"
    assert Path(name).name == name and ".." not in name
    assert NAME.match(Names(base, None, base, finetune).file(size, kind, lora=True))["Type"] == "LoRA"


def test_several_types_and_what_the_files_say(tmp_path: Path) -> None:
    """One file each, nothing besides; metadata after the convention."""
    folder = folder_of("qwen2", {"use_sliding_window": False}, tmp_path / "Tiny-Qwen-132K-Instruct")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    artifacts = exported("qwen2", folder, tmp_path / "my.run", "export.gguf.types=[f16,q4_k_m]")
    place = tmp_path / "my.run" / "export" / "gguf"
    assert sorted(place.iterdir()) == sorted(a.path for a in artifacts)
    assert [a.path.name.split("-")[-1] for a in artifacts] == ["F16.gguf", "Q4_K_M.gguf"]
    assert all(NAME.match(a.path.name) for a in artifacts)
    assert "Q5_0" in artifacts[1].note  # rows of 64 and 192
    reader = gguf.GGUFReader(artifacts[1].path)
    assert value(reader, "GGUF.version") == 3
    wanted = {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "Tiny-Qwen-132K-Instruct my.run",
        "general.basename": "Tiny-Qwen",
        "general.finetune": "my.run",
        "general.version": "v1.0",
        "general.size_label": "132K",
        "general.license": "apache-2.0",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny-Qwen-132K-Instruct",
        "general.sampling.top_k": 20,
        "general.sampling.temp": pytest.approx(0.7),
        "general.sampling.penalty_repeat": pytest.approx(1.05),
        "qwen2.context_length": 2048,
        "qwen2.block_count": 2,
        "qwen2.embedding_length": 64,
        "qwen2.feed_forward_length": 192,
        "qwen2.attention.head_count": 4,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 10000.0,
    }
    assert {key: value(reader, key) for key in wanted} == wanted
    assert value(reader, "tokenizer.chat_template")
    starts = [tensor.data_offset for tensor in reader.tensors]
    assert all(start % 32 == 0 for start in starts)


def test_an_adapter_is_merged_and_new_tokens_have_rows(tmp_path: Path) -> None:
    """LoRA over a grown vocabulary: llama.cpp has the trained model's logits, of the new tokens as well."""
    hooks, plan = runs.prepared(
        [
            *("+model=smollm2", "model.tiny=true", "model.dtype=float32", "model.new_tokens=['<one>','<two>']"),
            *("+export=[gguf]", "export.gguf.types=[f32]", "export.gguf.verify=false", f"output_dir='{tmp_path}'"),
        ]
    )
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model)
    [artifact] = pipeline.export(hooks, loaded)
    ids = loaded.tokenizer("abc<one> d<two>e", add_special_tokens=False)["input_ids"]
    wanted = runs.logits_of(loaded.model, {"input_ids": torch.tensor([ids])})[0]
    with LlamaCpp(artifact.path) as consumer:
        assert consumer.tokens("abc<one> d<two>e") == ids
        found = consumer.logits(ids)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-4


def test_a_window_that_llama_cpp_lacks_ends_the_context(tmp_path: Path) -> None:
    """Past the window llama.cpp would see more than the model was trained with."""
    folder = folder_of("mistral", {}, tmp_path / "model")
    [artifact] = exported("mistral", folder, tmp_path / "run", "export.gguf.types=[f32]")
    assert value(gguf.GGUFReader(artifact.path), "llama.context_length") == 8
    assert "context of 8 tokens" in artifact.note


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["+model=llama", "export.gguf.types=[q4_k_n]"], "did you mean q4_k_"),
        (["+model=llama", "export.gguf.types=[]"], "is empty"),
        (["+model=llama", "export.gguf.types=[f16,f16]"], "names a type twice"),
        (["+model=gpt_oss"], "gpt_oss cannot be written as GGUF yet"),
        (["+model=qwen3_moe"], "experts in all layers"),
        (["+model=gemma3"], "every sixth layer"),
        (["+model=llama", "+trainer=reward", "data=preference"], "head of its own"),
    ],
)
def test_the_plan_refuses(overrides: list[str], said: str) -> None:
    """Before any weight is read, with a reason."""
    problems = runs.refusals(["model.tiny=true", "+export=[gguf]", *overrides])
    assert [p for p in problems if said in f"{p.message} {p.fix}" and p.key.startswith("export.gguf")], problems


def spoiled(folder: Path, worth: float) -> Path:
    """A checkpoint with one weight of this value."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = worth
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UNFIT = [(float("nan"), "f32"), (float("inf"), "q8_0"), (1e5, "f16"), (1e5, "q4_1")]


@pytest.mark.parametrize(("worth", "kind"), UNFIT)
def test_values_that_do_not_fit_are_refused(worth: float, kind: str, tmp_path: Path) -> None:
    """By the tensor's name, and no file is left, whole or half."""
    folder = spoiled(folder_of("llama", {}, tmp_path / "model"), worth)
    with pytest.raises(Refused, match=r"blk\.1\.ffn_down\.weight") as caught:
        exported("llama", folder, tmp_path / "run", f"export.gguf.types=[{kind}]")
    assert caught.value.code == Exit.NUMERIC
    assert [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []


def test_a_full_disk_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has both numbers."""
    folder = folder_of("llama", {}, tmp_path / "model")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12, 50 * 2**20))
    with pytest.raises(Refused, match=r"takes .* has .* free") as caught:
        exported("llama", folder, tmp_path / "run")
    assert caught.value.code == Exit.IO
    assert not (tmp_path / "run").exists() or [p for p in (tmp_path / "run").rglob("*") if p.is_file()] == []


def test_the_adapter_alone_as_well(tmp_path: Path) -> None:
    """One more file, named as the convention has it; unverified, as its base is not among the exports."""
    hooks, plan = runs.prepared(
        [*runs.TINY, "+export=[gguf]", "export.gguf.types=[]", "export.gguf.lora=true", f"output_dir='{tmp_path}'"]
    )
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model, trainable_only=True)
    [artifact] = pipeline.export(hooks, loaded)
    assert NAME.match(artifact.path.name)["Type"] == "LoRA"
    assert artifact.checks["verified"] is False and "base model" in artifact.checks["reason"]
    assert value(gguf.GGUFReader(artifact.path), "general.type") == "adapter"
    refused = runs.refusals([*runs.TINY, "adapter=full", "+export=[gguf]", "export.gguf.lora=true"])
    assert [p for p in refused if p.key == "export.gguf" and "adapter=full" in p.message]


def test_images_have_a_file_of_their_own(tmp_path: Path) -> None:
    """Beside the decoder, found by its beginning; the decoder has nothing of the tower."""
    wanted = ["+model=qwen2_vl", "model.tiny=true", "model.dtype=float32", "adapter=full", "+export=[gguf]"]
    hooks, plan = runs.prepared([*wanted, "export.gguf.verify=false", f"output_dir='{tmp_path}'"])
    decoder, images = pipeline.export_stored(hooks, plan)
    assert images.path.name.startswith("mmproj-")
    assert NAME.match(images.path.name.removeprefix("mmproj-"))
    assert value(gguf.GGUFReader(images.path), "general.type") == "mmproj"
    assert not [t.name for t in gguf.GGUFReader(decoder.path).tensors if t.name.startswith(("v.", "mm."))]


@pytest.mark.parametrize("target", ["gguf", "ollama"])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_a_head_that_training_makes_another_is_refused_before_it(target: str, module: str) -> None:
    """llama.cpp's Gemma has its embedding as the head; Llama may have one of its own."""
    words = ["model.tiny=true", f"adapter.modules_to_save=[{module}]", f"+export=[{target}]"]
    (problem,) = runs.refusals(["+model=gemma2", *words])
    assert problem.key == f"export.{target}"
    assert "has its embedding as the head" in problem.message
    assert not runs.refusals(["+model=smollm2", *words])
    assert not runs.refusals(["+model=gemma2", *words[::2], "adapter.modules_to_save=[lm_head,embed_tokens]"])
