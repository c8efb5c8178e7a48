"""bitsandbytes on the CPU: QLoRA trains, and a checkpoint that is quantized already loads as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

import ftcore

WORDS = [
    "+model=llama",
    "model.tiny=true",
    "+trainer=sft",
    "trainer.max_steps=3",
    "trainer.global_batch=4",
    "trainer.learning_rate=5e-3",
]


def linear_kinds(model) -> set[str]:
    return {type(m.get_base_layer()).__name__ for m in model.modules() if hasattr(m, "get_base_layer")}


@pytest.mark.parametrize(("quantizer", "layer"), [("bnb_nf4", "Linear4bit"), ("bnb_int8", "Linear8bitLt")])
def test_quantized_weights_train(in_tmp: Path, quantizer: str, layer: str) -> None:
    model, _ = ftcore.load(["+model=llama", "model.tiny=true", f"+quantizer={quantizer}"])
    assert layer in linear_kinds(model)
    result = ftcore.run([*WORDS, f"+quantizer={quantizer}"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]


def test_a_saved_nf4_checkpoint_loads_as_it_is_and_trains(in_tmp: Path) -> None:
    model, tokenizer = ftcore.load(["+model=llama", "model.tiny=true", "+quantizer=bnb_nf4"])
    base = model.get_base_model()
    plain = model.unload()
    plain.save_pretrained("nf4")
    tokenizer.save_pretrained("nf4")
    assert base is not None
    loaded, _ = ftcore.load(["+model=llama", "model.path=nf4"])
    assert "Linear4bit" in linear_kinds(loaded)
    result = ftcore.run([*WORDS[:1], "model.path=nf4", *WORDS[2:]])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    with pytest.raises(ftcore.Refused, match="already quantized"):
        ftcore.run([*WORDS[:1], "model.path=nf4", *WORDS[2:], "+quantizer=bnb_nf4"])
    with pytest.raises(ftcore.Refused, match="quantized and cannot be trained in full"):
        ftcore.run([*WORDS[:1], "model.path=nf4", *WORDS[2:], "adapter=full"])


@pytest.mark.parametrize(("quantizer", "bound"), [("bnb_nf4", 1e-4), ("bnb_int8", 5e-2)])
def test_a_merged_export_of_a_quantized_run_is_plain(in_tmp: Path, quantizer: str, bound: float) -> None:
    """Int8 also rounds its inputs, so its own forward pass is the coarse one."""
    import torch
    from transformers import AutoModelForCausalLM

    model, tokenizer = ftcore.load(["+model=llama", "model.tiny=true", f"+quantizer={quantizer}"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    (artifact,) = ftcore.export(model, tokenizer, ["+export=[safetensors]", "export.safetensors.dtype=float32"])
    merged = AutoModelForCausalLM.from_pretrained(artifact.path, dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    batch = tokenizer("some words", return_tensors="pt")
    model.eval()
    with torch.no_grad():
        difference = (model(**batch).logits - merged(**batch).logits).abs().max()
    assert difference < bound


def test_gradients_still_flow_after_an_evaluation(in_tmp: Path) -> None:
    """bitsandbytes would repack 4-bit weights in an evaluation on some CPUs, and drop gradients through them."""
    import torch

    model, tokenizer = ftcore.load(["+model=llama", "model.tiny=true", "+quantizer=bnb_nf4", "adapter.init=gaussian"])
    batch = tokenizer("some words", return_tensors="pt")

    def gradient() -> torch.Tensor:
        model.train()
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    before = gradient()
    model.eval()
    with torch.no_grad():
        model(**batch)
    assert before.abs().sum() > 0
    assert torch.equal(gradient(), before)
