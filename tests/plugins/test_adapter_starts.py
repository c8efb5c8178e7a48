"""Forms of LoRA and its starts: each is PEFT's own, in the model's numbers and in the first step."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ftcore
from ftcore import checkpoint
from ftcore.device import Device
from ftcore.testing import maths, runs
from ftcore_adapters._rounding import say_lost
from ftcore_adapters.lora import Config, _differences

FORMS = {
    "rslora": ({"use_rslora": True}, "adapter.variant=rslora"),
    "dora": ({"use_dora": True}, "adapter.variant=dora"),
    "pissa": ({"init_lora_weights": "pissa"}, "adapter.init=pissa"),
    "olora": ({"init_lora_weights": "olora"}, "adapter.init=olora"),
    "gaussian": ({"init_lora_weights": "gaussian"}, "adapter.init=gaussian"),
    "pissa with rslora": (
        {"init_lora_weights": "pissa", "use_rslora": True},
        "adapter.init=pissa adapter.variant=rslora",
    ),
}
TOLERANCE = 2e-5
"""Relative, in float32: the same sums in another order."""


def tiny(family: str, *words: str) -> list[str]:
    return [f"+model={family}", "model.tiny=true", "model.dtype=float32", *words]


def by_peft(family: str, **settings: Any) -> Any:
    """PEFT's own model around the same checkpoint, from the same seed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, set_seed

    _, plan = runs.prepared(tiny(family))
    model = AutoModelForCausalLM.from_pretrained(checkpoint.locate(plan.run.model, plan.family), dtype=torch.float32)
    set_seed(0)
    targets = list(plan.family.lora_targets)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **settings))


@pytest.mark.few
@pytest.mark.parametrize(
    ("family", "kernel_set"),
    [
        ("llama", "reference"),
        ("qwen3", "reference"),
        ("llama", "triton"),
        pytest.param("qwen3", "triton", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_weights_loss_and_gradients_are_those_of_peft(form: str, family: str, kernel_set: str) -> None:
    maths.needs_triton(kernel_set)
    settings, words = FORMS[form]
    theirs = by_peft(family, r=4, lora_alpha=12, **settings)
    words = [*words.split(), "adapter.r=4", "adapter.alpha=12"]
    ours = runs.loaded(tiny(family, *words, f"kernels=[{kernel_set}]"))
    weights, own = theirs.state_dict(), ours.model.state_dict()
    assert weights.keys() == own.keys()
    assert [name for name in weights if not torch.equal(weights[name], own[name])] == []

    claimed = {claim.role for claim in ours.patches.claims}
    if form == "dora":
        reason = f"{kernel_set}.decoder_layer has no DoRA"
        assert reason in [skip.reason for skip in ours.patches.skipped if skip.role == "decoder_layer"]
        assert {"rms_norm", "attention"} <= claimed
    else:
        assert "decoder_layer" in claimed
    for model in (theirs, ours.model):
        runs.shake(model, trainable_only=True)  # A has no gradient while B is 0
    batch = runs.batch_for(theirs)
    assert maths.apart(runs.logits_of(ours.model, batch), runs.logits_of(theirs, batch)) <= TOLERANCE
    ours_step, theirs_step = maths.loss_and_gradients(ours.model, batch), maths.loss_and_gradients(theirs, batch)
    maths.assert_same_step(ours_step, theirs_step, TOLERANCE)


@pytest.mark.parametrize("alpha", ["0", "-1"])
def test_a_scale_that_is_not_above_0_is_refused(alpha: str) -> None:
    (problem,) = runs.refusals(tiny("llama", f"adapter.alpha={alpha}", "adapter.init=pissa"))
    assert problem.lines() == [
        f"adapter.alpha: is {alpha}",
        "    fix: give a number above 0; twice the rank is usual",
    ]


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"dropout": 0.1}, "dropout"),
        ({"targets": ["q_proj"]}, "targets"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"targets": ["v_proj", "q_proj"]}, None),
        ({}, None),
    ],
)
def test_what_a_saved_adapter_would_not_heed_is_refused(asked: dict[str, Any], key: str | None, tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"r": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}))
    found = list(_differences(Config(**asked), file, recorded=False))
    assert [problem.key for problem in found] == ([] if key is None else [f"adapter.{key}"])
    file.write_text(json.dumps({"r": 8, "lora_dropout": 0.0, "target_modules": ".*q_proj"}))
    assert not [problem for problem in _differences(Config(**asked), file, recorded=False) if "targets" in problem.key]


def test_heads_over_float16_are_trained_in_float32() -> None:
    """No loss scaler takes gradients in float16."""
    model = runs.loaded(["+model=llama", "model.tiny=true", "model.dtype=float16", "+trainer=reward"]).model
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in name for name in trained)
    assert set(trained.values()) == {torch.float32}
    with torch.autocast("cpu", torch.float16):
        scores = model(input_ids=torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 3, dtype=torch.long)).logits
    scores.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model.dtype=float16 adapter.modules_to_save=[lm_head]", "gradients cannot be scaled"),
        ("+quantizer=bnb_nf4 adapter.modules_to_save=[q_proj]", "is in bnb_nf4 and cannot be trained whole"),
        ("+quantizer=bnb_int8 adapter.modules_to_save=[q_proj]", "is in bnb_int8 and cannot be trained whole"),
    ],
)
def test_modules_that_cannot_be_trained_whole(words: str, said: str) -> None:
    problems = runs.refusals(["+model=llama", "model.tiny=true", "+trainer=sft", *words.split()])
    assert [problem.key for problem in problems] == ["adapter.modules_to_save"]
    assert said in problems[0].message


def test_a_saved_adapter_has_its_parameters_among_its_targets(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text('{"r": 16, "target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}')
    asked = Config(targets=["experts.down_proj", "q_proj"])
    assert not list(_differences(asked, file, recorded=False))


def test_new_tokens_without_kernels(tmp_path: Path) -> None:
    words = ["+model=llama", "model.tiny=true", "kernels=[]", "model.new_tokens=[zork]", "+trainer=sft", "prompts=[]"]
    result = ftcore.run([*words, "trainer.max_steps=1", f"output_dir='{tmp_path / 'run'}'"])
    assert result.metrics["train_loss"] > 0


@pytest.mark.parametrize("words", ["adapter=full", "adapter.modules_to_save=[lm_head]"])
def test_steps_that_bfloat16_does_not_take_are_said(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*more: str) -> str:
        runs.loaded(["+model=llama", "model.tiny=true", "+trainer=sft", words, *more])
        return " ".join(capsys.readouterr().out.split())

    assert re.search(
        r"of those \d+% are changed by a step at a rate of 1e-06",
        said("model.dtype=bfloat16", "trainer.learning_rate=1e-6"),
    )
    assert "changed by a step" not in said("model.dtype=bfloat16", "trainer.learning_rate=1e-2")
    assert "changed by a step" not in said("model.dtype=float32", "trainer.learning_rate=1e-6")


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ([], "cpu", True),
        ([], "cuda", False),
        (["kernels=[triton]"], "cuda", False),
        (["kernels=[]"], "cuda", True),
        (["trainer.optimizer=adamw_torch"], "cuda", True),
        (["+trainer.args.optim_args='x=1'"], "cuda", True),  # bitsandbytes' own serves
    ],
)
def test_ftcores_own_optimizer_takes_them(
    words: list[str], kind: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["model.dtype=bfloat16", "trainer.learning_rate=1e-6", "trainer.optimizer=adamw_8bit", *words]
    _, plan = runs.prepared(["+model=llama", "model.tiny=true", "+trainer=sft", "adapter=full", *more])
    device = Device()
    vars(device).update(kind=kind, capability=(9, 0))  # where its cached properties are kept
    if not said:
        pytest.importorskip("triton")
    model = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    say_lost(replace(plan, device=device), model)
    assert ("changed by a step" in " ".join(capsys.readouterr().out.split())) == said


def test_an_adapter_of_another_task_is_refused(tmp_path: Path) -> None:
    """Its head would stay as it was drawn, or there would be none."""
    saved = tmp_path / "saved"
    runs.loaded(["+model=llama", "model.tiny=true", "+trainer=sft"]).model.save_pretrained(saved)  # type: ignore[operator]
    words = ["+model=llama", "model.tiny=true", f"adapter.path='{saved}'"]
    assert not runs.refusals([*words, "+trainer=dpo"])
    (problem,) = runs.refusals([*words, "+trainer=reward"])
    assert problem.key == "adapter.path"
    assert "CAUSAL_LM" in problem.message
    assert "merge it first" in problem.fix


def test_a_saved_adapter_of_a_model_that_reads_images_keeps_its_parts(tmp_path: Path) -> None:
    words, saved = ["+model=qwen2_vl", "model.tiny=true", "+trainer=sft", "data=images"], tmp_path / "saved"
    runs.loaded(words).model.save_pretrained(saved)  # type: ignore[operator]
    again = [*words, f"adapter.path='{saved}'"]
    assert not runs.refusals(again)
    for key, value in (("adapter.parts", "[language]"), ("adapter.targets", "[q_proj]")):
        (problem,) = runs.refusals([*again, f"{key}={value}"])
        assert problem.key == key
