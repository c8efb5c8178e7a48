"""Quantized exports: within the bound of their format, as their own library and transformers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ftcore import pipeline
from ftcore.specs import Artifact
from ftcore.testing import maths, runs

TINY = ("model.tiny=true", "model.dtype=float32")
DENSE = ("llama", "smollm2", "qwen2", "phi3", "lfm2", "gemma3")
SPARSE = ("qwen3_moe", "mixtral", "deepseek_v3")


def exported(folder: Path, family: str, target: str, *words: str, verify: bool = True) -> tuple[Artifact, Any]:
    """A tiny model with an adapter that does something, exported; the artifact and the model."""
    asked = [f"+export=[{target}]", f"export.{target}.verify={str(verify).lower()}", *words]
    hooks, plan = runs.prepared([f"+model={family}", *TINY, *asked, f"output_dir='{folder}'"])
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model, trainable_only=True)
    (artifact,) = pipeline.export(hooks, loaded)
    return artifact, loaded.model


def config_of(artifact: Artifact) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((artifact.path / "config.json").read_text(encoding="utf-8"))
    return config


def stored(artifact: Artifact) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(artifact.path / "model.safetensors")


@pytest.mark.parametrize("target", ["fp8", "int4"])
def test_weights_are_within_the_bound_of_the_format(tmp_path: Path, target: str) -> None:
    artifact, _ = exported(tmp_path, "llama", target)
    checks = artifact.checks
    assert checks["verified"], checks
    assert checks["consumer"] == "transformers"
    assert 0.5 < checks["max_weight_error"] <= 1
    assert checks["vllm"] == "unverified"
    assert 0 < checks["kl"] < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("family", [*DENSE[1:], *SPARSE])
@pytest.mark.parametrize("target", ["fp8", "int4"])
def test_every_text_family_is_within_the_bound(tmp_path: Path, family: str, target: str) -> None:
    artifact, _ = exported(tmp_path, family, target)
    assert artifact.checks["verified"], artifact.checks
    assert artifact.checks["max_weight_error"] <= 1


def test_the_check_of_the_bound_finds_a_wrong_scale(tmp_path: Path) -> None:
    """Scales that are a tenth too large are told."""
    from safetensors.torch import save_file

    from ftcore.merge import model_weights
    from ftcore.trained_model import Checkpoint
    from ftcore_exporters._compressed import Format
    from ftcore_exporters._compressed_export import read_back
    from ftcore_exporters._linear_layers import layers_of

    words = ["+model=llama", *TINY, "+export=[fp8]", "export.fp8.verify=false", f"output_dir='{tmp_path}'"]
    hooks, plan = runs.prepared(words)
    loaded = pipeline.load(hooks, plan)
    (artifact,) = pipeline.export(hooks, loaded)
    tensors = stored(artifact)
    name = "model.layers.1.mlp.down_proj.weight_scale"
    tensors[name] = tensors[name] * 1.1
    save_file(tensors, artifact.path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(model=loaded.model, tokenizer=loaded.tokenizer, plan=plan)
    weights = model_weights(checkpoint.base())
    layers = layers_of(checkpoint.config(), plan.family.auto_class, weights)
    checks = read_back(checkpoint, artifact.path, Format("FP8_DYNAMIC", "float-quantized"), layers, weights)
    assert not checks["verified"]
    assert checks["max_weight_error"] > 1.5
    assert "times what the format allows" in checks["reason"]


def test_fp8_holds_a_scale_per_row_and_leaves_the_head(tmp_path: Path) -> None:
    import torch

    artifact, _ = exported(tmp_path, "llama", "fp8", verify=False)
    tensors, config = stored(artifact), config_of(artifact)["quantization_config"]
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype == torch.float8_e4m3fn
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].shape == (weight.shape[0], 1)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
    assert tensors["lm_head.weight"].dtype == torch.float16
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "float-quantized"
    assert config["ignore"] == ["lm_head"]
    group = config["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert (group["weights"]["strategy"], group["weights"]["type"]) == ("channel", "float")
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)


def test_experts_are_packed_one_by_one_and_their_routers_are_not(tmp_path: Path) -> None:
    artifact, _ = exported(tmp_path, "qwen3_moe", "int4", verify=False)
    tensors, config = stored(artifact), config_of(artifact)["quantization_config"]
    experts = [name for name in tensors if ".experts." in name and name.endswith("weight_packed")]
    assert len(experts) == 4 * 3  # experts, and layers of each; the first layer is dense
    assert tensors["model.layers.1.mlp.gate.weight"].shape == (4, 64)
    assert config["ignore"] == ["lm_head", "model.layers.1.mlp.gate"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_librarys_own_unpacking_is_within_half_a_step(tmp_path: Path, symmetric: bool) -> None:
    """By compressed-tensors alone, without ftcore's check; 4 bits take 16 values."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    from ftcore.merge import merged_weights

    word = f"export.int4.symmetric={str(symmetric).lower()}"
    artifact, model = exported(tmp_path, "llama", "int4", word, verify=False)
    config = QuantizationConfig.model_validate(config_of(artifact)["quantization_config"])
    scheme = config.config_groups["group_0"]
    packer = BaseCompressor.get_value_from_registry(scheme.format)
    tensors, exact = stored(artifact), merged_weights(model.get_base_model())
    name = "model.layers.1.mlp.down_proj"
    parts = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    assert ("weight_zero_point" in parts) is not symmetric
    parts["weight_scale"] = parts["weight_scale"].float()
    found = packer.decompress(parts, scheme)["weight"]
    steps = parts["weight_scale"].repeat_interleave(scheme.weights.group_size, dim=1)
    error = ((found - exact[f"{name}.weight"]).abs() / steps).max()
    assert 0.4 < float(error) <= 0.5 + 1e-5
    levels = torch.unique((found / steps).round()[0, : scheme.weights.group_size])
    assert 4 < len(levels) <= 16


@pytest.mark.slow
def test_zero_points_are_read_by_transformers_and_are_closer(tmp_path: Path) -> None:
    even, _ = exported(tmp_path / "even", "llama", "int4")
    skewed, _ = exported(tmp_path / "skewed", "llama", "int4", "export.int4.symmetric=false")
    assert skewed.checks["verified"], skewed.checks
    assert skewed.checks["max_weight_error"] <= 1
    assert skewed.checks["kl"] < even.checks["kl"]


def test_rows_are_packed_the_same_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ftcore.weights import Weight
    from ftcore_exporters import _compressed

    values = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))
    weight = Weight((100, 64), values.dtype, lambda start, stop: values[start:stop])
    scheme = _compressed.Format("W4A16_ASYM", "pack-quantized", 32).scheme()
    whole = _compressed.compressed(weight, scheme, torch.bfloat16)
    monkeypatch.setattr(_compressed, "VALUES", 1)
    pieces = _compressed.compressed(weight, scheme, torch.bfloat16)
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


def test_a_row_of_zeros_stays_zero(tmp_path: Path) -> None:
    import torch

    from ftcore.weights import Weight
    from ftcore_exporters import _compressed

    values = torch.zeros(4, 64)
    weight = Weight((4, 64), values.dtype, lambda start, stop: values[start:stop])
    for form in (
        _compressed.Format("FP8_DYNAMIC", "float-quantized"),
        _compressed.Format("W4A16", "pack-quantized", 32),
    ):
        made = _compressed.compressed(weight, form.scheme(), torch.float16)
        assert torch.isfinite(made["weight_scale"].float()).all()
        assert (made["weight_scale"] > 0).all()
        if form.group_size is None:
            assert not made["weight"].float().any()


@pytest.mark.parametrize(("target", "kind"), [("bnb4", "Linear4bit"), ("bnb8", "Linear8bitLt")])
def test_bitsandbytes_holds_what_packing_at_load_time_gives(tmp_path: Path, target: str, kind: str) -> None:
    """Logits equal those of the merged 16-bit model that is packed while it is loaded, to the last bit."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    words = [f"export.{target}.verify=true", "export.safetensors.verify=false"]
    hooks, plan = runs.prepared(
        ["+model=llama", *TINY, f"+export=[{target},safetensors]", f"output_dir='{tmp_path}'", *words]
    )
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model, trainable_only=True)
    packed, merged = pipeline.export(hooks, loaded)
    settings = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16,
        )
        if target == "bnb4"
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    found = AutoModelForCausalLM.from_pretrained(packed.path)
    wanted = AutoModelForCausalLM.from_pretrained(merged.path, dtype="auto", quantization_config=settings)
    assert kind in {type(module).__name__ for module in found.modules()}
    batch = runs.batch_for(found)
    logits = runs.logits_of(found, batch)
    assert torch.equal(logits, runs.logits_of(wanted, batch))
    assert packed.checks["verified"], packed.checks
    bound = 0.3 if target == "bnb4" else 0.03
    assert 0 < maths.apart(logits, runs.logits_of(loaded.model, batch)) < bound


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+model=bert", "+export=[fp8]"], "fp8 takes models that write text"),
        (["+model=qwen2_vl", "+export=[int4]"], "int4 takes text models only"),
        (["+model=gpt_oss", "+export=[fp8]"], "are published as one tensor"),
        (["+model=qwen3_moe", "+export=[bnb4]"], "holds this family's experts in other tensors"),
        (["+model=qwen3_moe", "+export=[int4]", "export.int4.symmetric=false"], "reads experts with zero points"),
        (["+model=llama", "+export=[int4]", "export.int4.group_size=100"], "is 100"),
        (["+model=llama", "+export=[int4]", "export.int4.group_size=128"], "do not divide into groups of 128"),
        (["+model=llama", "+export=[bnb8]", "export.bnb8.threshold=-1"], "is -1"),
        (
            ["+model=llama", "+export=[fp8]", "+quantizer=bnb_nf4", "adapter.variant=dora"],
            "DoRA over quantized weights cannot be merged exactly",
        ),
        (
            ["+model=llama", "+export=[bnb4]", "+quantizer=bnb_nf4", "adapter.variant=dora"],
            "DoRA over quantized weights cannot be merged exactly",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused_in_the_plan(tmp_path: Path, words: list[str], said: str) -> None:
    found = runs.refusals([*words[:1], *TINY, *words[1:], f"output_dir='{tmp_path}'"])
    assert any(said in problem.message for problem in found), [problem.message for problem in found]
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from ftcore import Refused

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 100, 0))  # type: ignore[attr-defined]
    with pytest.raises(Refused, match="the quantized model takes"):
        exported(tmp_path / "run", "llama", "int4", verify=False)
    assert not [file for file in (tmp_path).rglob("*") if file.is_file()]
