"""`+quantizer=fp8`: what becomes fp8, that LoRA trains over it, and that a merged export holds what it trained over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ftcore
from ftcore.merge import merged_weights
from ftcore.patching import unpatch
from ftcore.testing import runs
from ftcore_kernels.layers.fp8_linear import Fp8Linear

MODEL = ["+model=llama", "model.tiny=true"]
FP8 = [*MODEL, "+quantizer=fp8"]
TRAIN = ["+trainer=sft", "trainer.max_steps=3", "trainer.global_batch=4", "trainer.learning_rate=5e-3"]
BACKWARDS = ["fp8", "bf16"]


def layers(model: nn.Module) -> dict[str, Fp8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("backward", BACKWARDS)
def test_the_linear_layers_and_nothing_else_become_fp8(in_tmp: Path, backward: str) -> None:
    model: Any = ftcore.load([*FP8, f"quantizer.backward={backward}"])[0]
    plain: Any = ftcore.load(MODEL)[0]
    found = layers(model)
    assert {name.split(".")[-2] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert len(found) == 7 * model.config.num_hidden_layers
    assert type(model.get_base_model().lm_head) is nn.Linear
    assert not layers(plain), "a second model changed"
    for layer in found.values():
        assert layer.weight.dtype == torch.float8_e4m3fn
        assert (layer.weight_t is not None) == (backward == "fp8")
        assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_are_ordinary_and_in_float32(in_tmp: Path, dtype: str) -> None:
    from peft.tuners.lora import Linear

    model: Any = ftcore.load([*FP8, f"model.dtype={dtype}"])[0]
    plain: Any = ftcore.load([*MODEL, f"model.dtype={dtype}"])[0]
    assert {type(m) for m in model.modules() if hasattr(m, "lora_A")} == {Linear}
    ours, theirs = adapters(model), adapters(plain)
    assert set(ours) == set(theirs)
    for name, parameter in ours.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, theirs[name]), "it starts elsewhere than over 16-bit weights"


@pytest.mark.few
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_steps(in_tmp: Path, backward: str, dtype: str) -> None:
    model, tokenizer = ftcore.load([*FP8, f"quantizer.backward={backward}", f"model.dtype={dtype}"])
    frozen = {name: layer.weight.detach().view(torch.uint8).clone() for name, layer in layers(model).items()}
    batch = tokenizer("Some words to learn by heart.", return_tensors="pt").to(model.device)
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=5e-3)
    losses = []
    for step in range(4):
        loss = model(**batch, labels=batch["input_ids"]).loss
        losses.append(loss.item())
        loss.backward()
        for name, parameter in adapters(model).items():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            if step or "lora_B" in name:  # B starts at zero, and with it the gradient of A
                assert parameter.grad.norm() > 0, name
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert all(torch.equal(layer.weight.view(torch.uint8), frozen[name]) for name, layer in layers(model).items())


@pytest.mark.parametrize("memory", ["off", "least"])
def test_a_run_learns(in_tmp: Path, memory: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = ftcore.run([*FP8, *TRAIN, f"memory={memory}"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    if not torch.cuda.is_available():
        assert "fp8: weights are unpacked for each product" in capsys.readouterr().out


def test_merged_weights_are_those_that_were_trained_over(in_tmp: Path) -> None:
    model: Any = ftcore.load([*FP8, "adapter.targets=[q_proj]"])[0]
    with torch.no_grad():
        for parameter in adapters(model).values():
            parameter.normal_(std=0.05)
    base = model.get_base_model()
    merged = merged_weights(base)
    assert {name.removesuffix(".weight") for name in merged if name.endswith("_proj.weight")} == {
        name.removesuffix(".base_layer") for name in layers(base)
    }
    assert not [name for name in merged if "scale" in name or "weight_t" in name]
    for name, layer in layers(base).items():
        weight = layer.dequantize()
        if name.endswith(".base_layer"):
            weight = weight + base.get_submodule(name.removesuffix(".base_layer")).get_delta_weight("default")
        assert torch.equal(merged[f"{name.removesuffix('.base_layer')}.weight"], weight)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_merged_export_is_plain_and_says_nearly_the_same(in_tmp: Path, dtype: str) -> None:
    """The fp8 model also rounds the inputs of each product, which is all that is left of a difference."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = ftcore.load(FP8)
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    (artifact,) = ftcore.export(model, tokenizer, ["+export=[safetensors]", f"export.safetensors.dtype={dtype}"])
    merged = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    batch = tokenizer("some words", return_tensors="pt").to(model.device)
    model.eval()
    with torch.no_grad():
        ours, theirs = model(**batch).logits.cpu(), merged(**batch.to("cpu")).logits
    assert (ours - theirs).norm() / theirs.norm() < 0.08
    if torch.cuda.is_available():
        return
    # Without that rounding they are equal. A whole-layer kernel reads the weights itself, so it goes first.
    unpatch(model)
    with torch.no_grad():
        for layer in layers(model).values():
            layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.dequantize(), layer.bias)  # type: ignore[method-assign]
        exact = model(**batch).logits
    assert (exact - theirs).norm() / theirs.norm() < (1e-5 if dtype == "float32" else 2e-3)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["adapter=full"], "full fine-tuning cannot train fp8 weights"),
        (["adapter.variant=dora"], "`dora` needs the norms of 16-bit weights"),
        (["adapter.init=pissa"], "`pissa` needs 16-bit weights"),
        (["adapter.modules_to_save=[down_proj]"], "'down_proj' is in fp8 and cannot be trained whole"),
    ],
)
def test_what_needs_16_bit_weights_is_refused(in_tmp: Path, words: list[str], problem: str) -> None:
    with pytest.raises(ftcore.Refused, match=problem):
        ftcore.load([*FP8, *words])


def test_the_head_can_be_trained_whole(in_tmp: Path) -> None:
    result = ftcore.run([*FP8, *TRAIN, "adapter.modules_to_save=[lm_head]"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


def test_a_new_head_is_trained_and_so_is_none() -> None:
    loaded = runs.loaded(["+model=bert", "model.tiny=true", "+trainer=classify", "+quantizer=fp8"])
    quantized = {name for name, module in loaded.model.named_modules() if isinstance(module, Fp8Linear)}
    assert quantized
    assert not any("pooler" in name or "classifier" in name for name in quantized)
    pooler = [p for name, p in loaded.model.named_parameters() if "pooler" in name and p.requires_grad and p.ndim == 2]
    assert pooler
    assert all(p.dtype.itemsize > 1 for p in pooler)
