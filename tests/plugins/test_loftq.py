"""LoftQ: over 4-bit weights, A and B start as what rounding took."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import ftcore
from ftcore import checkpoint
from ftcore.cli import run as command
from ftcore.merge import merged_weights
from ftcore.testing import maths, runs

LLAMA = ("+model=llama", "model.tiny=true", "model.dtype=float32")
NF4 = (*LLAMA, "+quantizer=bnb_nf4")
LOFTQ = (*NF4, "adapter.init=loftq")


def originals(words: tuple[str, ...] = LLAMA) -> dict[str, torch.Tensor]:
    """The weights before rounding."""
    model: Any = runs.loaded([*words, "adapter=full"]).model
    return {name: weight.detach().to("cpu", copy=True) for name, weight in model.state_dict().items()}


def off(model: Any, original: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far each adapted layer's weight with its adapter is from the one before rounding."""
    merged = merged_weights(model.get_base_model())
    return {name: float((weight - original[name]).norm()) for name, weight in merged.items() if "_proj" in name}


def matrices(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    "words",
    [
        "adapter.r=8 adapter.alpha=8",
        "adapter.r=8 adapter.alpha=32",
        "adapter.r=8 adapter.alpha=4 adapter.variant=rslora",
        "quantizer.double_quant=false",
        "adapter.r=100",  # k_proj and v_proj have fewer rows
    ],
)
def test_every_adapted_weight_is_nearer_to_the_original_than_nf4_alone(words: str) -> None:
    original = originals()
    plain = off(runs.loaded([*NF4, *words.split()]).model, original)
    start = off(runs.loaded([*LOFTQ, *words.split()]).model, original)
    assert len(start) == 14
    assert [name for name in start if not start[name] < 0.9 * plain[name]] == []
    if "r=100" in words:  # all of what rounding took fits
        assert max(start.values()) < 1e-4


def by_peft(monkeypatch: pytest.MonkeyPatch, rank: int) -> dict[str, torch.Tensor]:
    """What PEFT's own function makes of an equal model; it knows no scale, and no CPU unless it is told of one."""
    from peft import LoraConfig, get_peft_model, replace_lora_weights_loftq
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    _, plan = runs.prepared(list(LLAMA))
    place = checkpoint.locate(plan.run.model, plan.family)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    where = {"": torch.cuda.current_device()} if torch.cuda.is_available() else None
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, quantization_config=nf4, device_map=where)
    targets = list(plan.family.lora_targets)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, r=rank, lora_alpha=rank))
    with monkeypatch.context() as patched:
        if not torch.cuda.is_available():
            to = torch.Tensor.to

            def here(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
                assert options.pop("device", "cuda") == "cuda"
                return to(tensor, *args, **options)

            patched.setattr(torch.Tensor, "to", here)
        replace_lora_weights_loftq(model, place)
    return matrices(model)


def test_a_and_b_are_those_of_peft_where_its_scale_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = by_peft(monkeypatch, rank=8)
    ours = matrices(runs.loaded([*LOFTQ, "adapter.r=8", "adapter.alpha=8"]).model)
    assert len(theirs) == 28
    assert ours.keys() == theirs.keys()
    for name, matrix in theirs.items():
        torch.testing.assert_close(ours[name], matrix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("words", ["adapter.alpha=32", "adapter.alpha=3 adapter.variant=rslora"])
def test_with_another_scale_the_product_is_that_of_peft(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    theirs = by_peft(monkeypatch, rank=8)
    model: Any = runs.loaded([*LOFTQ, "adapter.r=8", *words.split()]).model
    for path, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            a, b = (theirs[f"{path}.lora_{which}.default.weight"] for which in "AB")
            torch.testing.assert_close(layer.get_delta_weight("default"), b @ a, rtol=1e-4, atol=1e-6)


def test_the_4_bit_weights_stay_as_they_are() -> None:
    plain, start = (runs.loaded([*words]).model.state_dict() for words in (NF4, LOFTQ))
    assert plain.keys() == start.keys()
    assert {name for name in plain if not torch.equal(plain[name], start[name])} == {n for n in plain if "lora_" in n}


def test_dora_begins_with_the_same_weights() -> None:
    """Its norms are those of the weights with A and B, so that it changes none of them."""
    maths.assert_same_logits(runs.loaded([*LOFTQ, "adapter.variant=dora"]), runs.loaded([*LOFTQ]), 1e-5)


@pytest.mark.parametrize("kernel_set", ["reference", "triton"])
def test_layers_read_it(kernel_set: str) -> None:
    maths.needs_triton(kernel_set)
    plain = runs.loaded([*LOFTQ, "adapter.r=8", "kernels=[]"])
    ours = runs.loaded([*LOFTQ, "adapter.r=8", f"kernels=[{kernel_set}]"])
    assert "decoder_layer" in {claim.role for claim in ours.patches.claims}
    batch = runs.batch_for(plain.model)
    steps = [maths.loss_and_gradients(loaded.model, batch) for loaded in (ours, plain)]
    maths.assert_same_step(*steps, tolerance=2e-5)


def test_a_run_trains_it_and_what_it_saves_is_a_plain_adapter_of_the_same_4_bit_weights(in_tmp: Path) -> None:
    from transformers import AutoModelForCausalLM

    words = [*LOFTQ, "+trainer=sft", "trainer.max_steps=2", "trainer.global_batch=4", "sampling.max_new_tokens=1"]
    result = ftcore.run([*words, "output_dir=run", "+export=[safetensors]", "export.safetensors.dtype=float32"])
    assert result.metrics["eval_loss"] < result.metrics["eval_loss_before"]
    assert json.loads(Path("run/trained/adapter_config.json").read_text())["init_lora_weights"] is True
    again = runs.reloaded([*LOFTQ], "run")
    later = runs.loaded([*NF4, "adapter.path=run/trained"])
    maths.assert_same_logits(later, again, 1e-6)
    merged = AutoModelForCausalLM.from_pretrained(result.artifacts[0].path, dtype=torch.float32).to(again.model.device)
    batch = runs.batch_for(merged)
    assert maths.apart(runs.logits_of(again.model, batch), runs.logits_of(merged, batch)) < 1e-4
    original = originals()
    assert sum(off(again.model, original).values()) < sum(off(runs.loaded([*NF4]).model, original).values())


def test_a_checkpoint_in_several_files_is_read(in_tmp: Path) -> None:
    loaded = runs.loaded([*LLAMA, "adapter=full"])
    loaded.model.save_pretrained("parts", max_shard_size="100KB")
    loaded.tokenizer.save_pretrained("parts")
    assert len(list(Path("parts").glob("*.safetensors"))) > 1
    parts = matrices(runs.loaded([*LOFTQ, "model.tiny=false", "model.path=parts"]).model)
    whole = matrices(runs.loaded([*LOFTQ]).model)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.parametrize("family", ["bert", "gemma3_vision"])
def test_weights_of_other_names_in_the_checkpoint_are_found(family: str) -> None:
    words = (f"+model={family}", *LOFTQ[1:])
    original = originals((*words[:2], "model.dtype=float32"))
    model: Any = runs.loaded([*words]).model
    merged = merged_weights(model.get_base_model())
    far = {n: maths.apart(w, original[n]) for n, w in merged.items() if n in original and w.ndim == 2}
    assert far
    assert max(far.values()) < 0.12, "NF4 moves weights by a tenth; another layer's would be far away"


def refusal(*words: str) -> list[tuple[str, str, str]]:
    return [(p.key, p.message, p.fix) for p in runs.refusals(["+model=llama", "adapter.init=loftq", *words])]


NO_4_BITS = "`loftq` makes up for 4-bit rounding, and"
USE_NF4 = "use +quantizer=bnb_nf4, or leave adapter.init out"


def test_what_makes_no_sense_is_refused(in_tmp: Path) -> None:
    tiny = "model.tiny=true"
    add = "add +quantizer=bnb_nf4, or leave adapter.init out"
    assert refusal(tiny) == [("adapter.init", f"{NO_4_BITS} no weight is rounded", add)]
    for quantizer in ("bnb_int8", "fp8"):
        message = f"{NO_4_BITS} {quantizer} does not round to 4 bits"
        assert refusal(tiny, f"+quantizer={quantizer}") == [("adapter.init", message, USE_NF4)]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("+export=[safetensors] export.safetensors.onto=original", "export.safetensors.onto"),
        ("+export=[vllm] export.vllm.form=adapter", "export.vllm.form"),
        ("+export=[gguf] export.gguf.lora=true", "export.gguf"),
    ],
)
def test_it_is_not_added_to_weights_that_never_lost_what_it_holds(words: str, key: str, in_tmp: Path) -> None:
    assert [p.key for p in runs.refusals([*LOFTQ, *words.split()])] == [key]
    assert not runs.refusals([*NF4, *words.split()])


def test_later_exports_know_of_it_too(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ftcore.run([*LOFTQ, "+trainer=sft", "trainer.max_steps=1", "prompts=[]", "output_dir=run"])
    assert command(["export", "run=run", "+export=[safetensors]", "export.safetensors.onto=original"]) == 2
    assert "use export.safetensors.onto=dequantized" in capsys.readouterr().err
    assert command(["export", "run=run", "+export=[adapter]", "export.adapter.verify=false"]) == 0
    assert "right only over the base quantized by bnb_nf4" in capsys.readouterr().out


def test_a_quantized_checkpoint_is_refused(in_tmp: Path) -> None:
    model, tokenizer = ftcore.load([*NF4])
    model.unload().save_pretrained("nf4")
    tokenizer.save_pretrained("nf4")
    message = "`loftq` needs the weights before rounding, and the checkpoint is already quantized"
    fix = "start from the 16-bit checkpoint with +quantizer=bnb_nf4"
    assert refusal("model.path=nf4") == [("adapter.init", message, fix)]


def test_a_checkpoint_without_safetensors_is_refused(in_tmp: Path) -> None:
    Path("old").mkdir()
    Path("old/config.json").write_text('{"model_type": "llama"}')
    message = "`loftq` reads the weights before rounding from safetensors, and old has none"
    fix = "save the checkpoint again with transformers"
    assert refusal("model.path=old", "+quantizer=bnb_nf4") == [("adapter.init", message, fix)]


@pytest.mark.parametrize(("asked", "quantizer"), [("loftq", "+quantizer=bnb_nf4"), ("pissa", "kernels=[]")])
def test_a_saved_adapter_keeps_its_start(in_tmp: Path, asked: str, quantizer: str) -> None:
    runs.loaded([*LLAMA, "adapter.init=olora"]).model.save_pretrained("saved")
    words = [*LLAMA, "adapter.path=saved", quantizer]
    (problem,) = runs.refusals([*words, f"adapter.init={asked}"])
    assert problem.key == "adapter.init"
    assert problem.message == f"is {asked}, but the adapter saved in saved has olora"
    assert problem.fix == "a saved adapter keeps its init: leave adapter.init out"
    if asked == "pissa":
        assert not runs.refusals([*words, "adapter.init=olora"])
