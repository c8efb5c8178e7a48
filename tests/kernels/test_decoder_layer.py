"""The whole decoder layer on tiny models: loss and every gradient are untouched transformers' and PEFT's.

Hand-built roles cover the traits that the layer knows. What it does not compute has to go to the family's own forward,
so each test also says which of the two ran.
"""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import (
    DEVICE,
    FAMILIES,
    LEVELS,
    SIZES,
    adapt,
    base,
    batch,
    build,
    keep,
    layers,
    manual,
    offered,
    own_forwards,
    pair,
    patched,
)
from peft import LoraConfig

from ftcore.device import Device
from ftcore.patching import patch
from ftcore.specs import Phase, Skip
from ftcore.testing import maths, runs

TOLERANCE = 1e-5


@pytest.fixture(params=["reference", "triton"])
def kernel_set(request) -> str:
    """For the cases that are also tried on Triton's steps."""
    maths.needs_triton(request.param)
    return request.param


def padded(side: str) -> dict[str, torch.Tensor]:
    data = batch()
    mask = torch.ones_like(data["input_ids"])
    mask[1, -4:] = 0
    mask[2, -1:] = 0
    mask = mask if side == "right" else mask.flip(1)
    ids = data["input_ids"].where(mask == 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}


def assert_same(plain: Any, found: tuple[torch.Tensor, dict[str, torch.Tensor]], data: dict[str, Any]) -> None:
    """Loss and gradients are the untouched model's, and every trained parameter has one that is not nothing."""
    loss, gradients = maths.loss_and_gradients(plain, data)
    our_loss, ours = found
    assert maths.apart(our_loss, loss) <= TOLERANCE
    assert set(ours) == set(gradients) == {name for name, p in plain.named_parameters() if p.requires_grad}
    assert [name for name, g in ours.items() if not (g.isfinite().all() and g.any())] == []
    far = {name: away for name in gradients if not (away := maths.apart(ours[name], gradients[name])) <= TOLERANCE}
    assert not far
    assert [name for name in ours if ours[name].dtype != gradients[name].dtype] == []


LORA = {
    "rank 3, odd scale": {"r": 3, "lora_alpha": 7},
    "rank 16": {"r": 16, "lora_alpha": 32},
    "rank 100": {"r": 100, "lora_alpha": 50},
    "rsLoRA": {"r": 5, "lora_alpha": 7, "use_rslora": True},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "k and up": {"target_modules": ["k_proj", "up_proj"]},
    "o": {"target_modules": ["o_proj"]},
    "down": {"target_modules": ["down_proj"]},
    "ranks of their own": {"r": 4, "rank_pattern": {"k_proj": 20, "up_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "wide ranks of their own": {"r": 4, "rank_pattern": {"k_proj": 70, "up_proj": 65}},
    "last layer": {"layers_to_transform": [1]},
    "first layer": {"layers_to_transform": [0]},
}


@pytest.mark.parametrize("lora", LORA.values(), ids=LORA)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_lora(family, lora) -> None:
    plain, ours = pair(family, lora=lora)
    assert_same(plain, manual(ours, batch()), batch())


FEW = ("rank 3, odd scale", "rank 100", "k and up", "ranks of their own")


@pytest.mark.parametrize(
    "lora", [pytest.param(LORA[name], id=name, marks=[] if name in FEW else pytest.mark.slow) for name in LORA]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_lora_on_triton(family, lora) -> None:
    maths.needs_triton("triton")
    plain, ours = pair(family, "triton", lora)
    assert_same(plain, manual(ours, batch()), batch())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [{"r": 16, "lora_alpha": 20}, {"r": 100, "lora_alpha": 50}, False])
def test_families(family, lora) -> None:
    plain, ours = pair(family, lora=lora)
    assert_same(plain, manual(ours, batch()), batch())


@pytest.mark.parametrize(
    "family",
    [
        "llama with biases",
        "gemma3",
        "phi3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "gemma2")),
    ],
)
@pytest.mark.parametrize("lora", [None, pytest.param(False, marks=pytest.mark.slow)])
def test_families_on_triton(family, lora) -> None:
    maths.needs_triton("triton")
    plain, ours = pair(family, "triton", lora)
    assert_same(plain, manual(ours, batch()), batch())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_full_fine_tuning(family, kernel_set) -> None:
    plain, ours = pair(family, kernel_set, False)
    assert_same(plain, manual(ours, batch()), batch())


@pytest.mark.parametrize(
    "name",
    [
        "norm",
        "q_proj",
        "gate_proj",
        "down_proj",
        "q_norm",
        "k_norm",
        "o_proj.bias",
        "layers.0",
    ],
)
def test_parts_that_are_trained(name) -> None:
    """Some weights trained, the others frozen, without LoRA."""
    plain = build("qwen3", attention_bias=True)
    for path, parameter in plain.named_parameters():
        parameter.requires_grad_(name in path)
    assert_same(plain, manual(patched(plain, "qwen3"), batch()), batch())


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "gelu_new"])
def test_activations(activation, kernel_set) -> None:
    plain, ours = pair("llama", kernel_set, hidden_act=activation)
    assert_same(plain, manual(ours, batch()), batch())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_functions(family, implementation) -> None:
    if (family, implementation) == ("gemma2", "sdpa"):
        pytest.skip("transformers' Gemma2 has none")
    plain, ours = pair(family, attn_implementation=implementation)
    assert_same(plain, manual(ours, batch()), batch())


@pytest.mark.parametrize(
    ("family", "words"),
    [("llama", ["+quantizer=bnb_nf4"]), ("qwen3", ["+quantizer=bnb_nf4", "quantizer.double_quant=false"])],
)
def test_nf4(family, words, kernel_set) -> None:
    pytest.importorskip("bitsandbytes")
    words = [f"+model={family}", "model.tiny=true", "model.dtype=float32", "adapter.r=12", *words]
    plain, ours = runs.loaded([*words, "kernels=[]"]), runs.loaded([*words, f"kernels=[{kernel_set}]"])
    for loaded in (plain, ours):
        runs.shake(loaded.model, trainable_only=True)
    assert ours.patches.counts()["decoder_layer", f"{kernel_set}.decoder_layer"] == 2
    data = runs.batch_for(plain.model)
    found = manual(ours.model, data)
    assert_same(plain.model, found, data)
    for level in range(LEVELS if kernel_set == "reference" else 1):
        keep(ours.model, level)
        assert_bitwise(manual(ours.model, data), found)


def assert_bitwise(one: Any, other: Any) -> None:
    assert torch.equal(one[0], other[0])
    assert [name for name in other[1] if not torch.equal(one[1][name], other[1][name])] == []


# What is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"r": 100}, False], ids=["LoRA", "wide LoRA", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_do_not_depend_on_what_is_kept(family, lora) -> None:
    _, ours = pair(family, lora=lora)
    data = padded("right")
    everything = manual(ours, data)
    for level in range(LEVELS):
        keep(ours, level)
        assert_bitwise(manual(ours, data), everything)


@pytest.mark.parametrize(
    ("family", "levels"),
    [
        ("qwen3", [0]),
        pytest.param("llama", [0], marks=pytest.mark.slow),
        pytest.param("llama", range(1, LEVELS), marks=pytest.mark.slow),
        pytest.param("qwen3", range(1, LEVELS), marks=pytest.mark.slow),
        pytest.param("gemma2", range(LEVELS), marks=pytest.mark.slow),
    ],
)
def test_gradients_do_not_depend_on_what_is_kept_on_triton(family, levels) -> None:
    maths.needs_triton("triton")
    _, ours = pair(family, "triton")
    everything = manual(ours, batch(2, 5))
    for level in levels:
        keep(ours, level)
        assert_bitwise(manual(ours, batch(2, 5)), everything)


FOUR = ("llama", "qwen3", "gemma2", "phi3")


def bytes_left(run: Callable[[], Any]) -> int:
    """What a function has allocated and not given back when it returns."""
    if DEVICE.type == "cuda":
        run()  # cuBLAS takes a workspace the first time
        gc.collect()
        before = torch.cuda.memory_allocated()
        out = run()
        return torch.cuda.memory_allocated() - before
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = run()
    del out
    return sum(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float32) for family in FOUR), ("llama", torch.bfloat16)]
)
def test_each_level_keeps_what_it_says(family, dtype) -> None:
    """Attention leaves nothing but its output here; in 16 bits plain PyTorch has `x A^T` in 32 and elsewhere."""
    _, ours = pair(family, lora=None if dtype == torch.float32 else False)
    ours.to(dtype)
    rows, length = 4, 64
    data = batch(rows, length)
    alive = []
    for level in range(LEVELS):
        keep(ours, level)
        alive.append(bytes_left(lambda: base(ours).model(data["input_ids"])))
    counted = layers(ours)[0].ftcore_recompute
    counted.width = dtype.itemsize
    levels = counted.levels(rows, length)
    assert len(levels) == LEVELS
    again = [level.again for level in levels]
    assert again == sorted(again, reverse=True)
    assert again[-1] == 0
    # The sums of attention's softmax: fp32, 4 heads. FlashAttention keeps them, and two numbers for dropout.
    flash = DEVICE.type == "cuda" and dtype == torch.bfloat16
    unkept = [0, 0 if flash else 4 * 4 * rows * length, 0, 0, 0]
    for level in range(1, LEVELS):
        said = levels[level].kept - levels[level - 1].kept - unkept[level]
        numbers = 2 * 2 * 512 if flash and level == 1 else 0  # in the allocator's smallest blocks
        assert alive[level] - alive[level - 1] == pytest.approx(2 * said, rel=0.02, abs=numbers)


# What is left alone ------------------------------------------------------------------------------------------------


def inputs_of(model: Any, rows: int = 2, length: int = 7, contiguous: bool = True) -> tuple[torch.Tensor, Any]:
    config = model.config.get_text_config()
    hidden = torch.randn(length, rows, config.hidden_size).transpose(0, 1)
    hidden = (hidden.contiguous() if contiguous else hidden).to(DEVICE)
    tables = base(model).model.rotary_emb(hidden, torch.arange(length, device=DEVICE)[None])
    return hidden.requires_grad_(), tables


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("lora", [None, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_inputs_stay_as_they_were(family, lora, contiguous, kernel_set) -> None:
    plain, ours = pair(family, kernel_set, lora)
    hidden, tables = inputs_of(ours, contiguous=contiguous)
    mask = torch.zeros(2, 1, 7, 7).masked_fill(torch.ones(7, 7).triu(1).bool(), -1e30).to(DEVICE)
    dout = torch.randn(2, 7, hidden.shape[-1]).to(DEVICE)
    weights = {name: p.detach().clone() for name, p in ours.named_parameters()}
    given = [hidden, *tables, mask, dout]
    before = [x.detach().clone() for x in given]
    grads = []
    for model in (ours, plain):
        out = layers(model)[0](hidden, position_embeddings=tables, attention_mask=mask)
        grads.append(torch.autograd.grad(out, hidden, dout)[0])
        assert all(map(torch.equal, before, given))
    assert maths.apart(*grads) <= TOLERANCE
    assert [name for name, p in ours.named_parameters() if not torch.equal(p, weights[name])] == []


def test_weights_keep_their_identity_and_values() -> None:
    """Weights that share an input may move in memory, and nothing else."""
    plain = adapt(build())
    ours = copy.deepcopy(plain)
    parameters = dict(ours.named_parameters())
    patch(ours, [FAMILIES["llama"].role], offered("reference"), Device(), Phase.ADAPTED)
    assert dict(ours.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in ours.named_parameters())
    assert all(torch.equal(p, dict(plain.named_parameters())[name]) for name, p in ours.named_parameters())


def test_a_second_backward_raises() -> None:
    _, ours = pair()
    loss = ours(**batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        loss.backward()


@pytest.mark.parametrize("lora", [None, False], ids=["LoRA", "full"])
@pytest.mark.parametrize("name", ["down_proj", "q_proj"])
def test_a_parameter_changed_before_the_backward_raises(name, lora) -> None:
    _, ours = pair(lora=lora)
    loss = ours(**batch()).loss
    with torch.no_grad():
        next(p for path, p in ours.named_parameters() if name in path and p.requires_grad).add_(1.0)
    with pytest.raises(RuntimeError, match=r"changed between|modified by an inplace operation"):
        loss.backward()


def test_an_input_changed_before_the_backward_raises() -> None:
    _, ours = pair()
    hidden, tables = inputs_of(ours)
    hidden = hidden * 1
    out = layers(ours)[0](hidden, position_embeddings=tables)
    with torch.no_grad():
        hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_an_optimizer_step_takes_effect() -> None:
    """Nothing of the weights is remembered from one step to the next."""
    plain, ours = pair()
    for model in (plain, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch()).loss.backward()
            optimizer.step()
    assert_same(plain, manual(ours, batch()), batch())


# Adapters that change ----------------------------------------------------------------------------------------------


def logits(model: Any, data: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=data["input_ids"]).logits


def test_a_disabled_adapter_is_the_base_model(kernel_set) -> None:
    untouched = logits(build(), batch())
    plain, ours = pair(kernel_set=kernel_set)
    with ours.disable_adapter(), own_forwards(ours) as calls:
        disabled = logits(ours, batch())
    assert not calls
    assert maths.apart(disabled, untouched) <= TOLERANCE
    assert maths.apart(logits(ours, batch()), logits(plain, batch())) <= TOLERANCE
    assert maths.apart(logits(ours, batch()), untouched) > 1e-2


def test_a_merged_adapter_falls_back_and_says_the_same() -> None:
    plain, ours = pair()
    ours.merge_adapter()
    with own_forwards(ours) as calls:
        merged = logits(ours, batch())
    assert len(calls) == 2
    assert maths.apart(merged, logits(plain, batch())) <= TOLERANCE
    ours.unmerge_adapter()
    for model in (plain, ours):
        model.train()
    assert_same(plain, manual(ours, batch()), batch())


@pytest.mark.parametrize("level", [0, LEVELS - 1])
def test_two_active_adapters_fall_back(level) -> None:
    plain, ours = pair()
    for model in (plain, ours):
        torch.manual_seed(8)
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))
        model.base_model.set_adapter(["default", "other"])
        runs.shake(model, trainable_only=True)
    keep(ours, level)
    with own_forwards(ours) as calls:
        found = maths.loss_and_gradients(ours, batch())
    # What keeps least is computed twice, here as everywhere.
    assert len(calls) == (4 if level == 0 else 2)
    assert_same(plain, found, batch())


def test_another_adapter_is_used_once_it_is_set() -> None:
    plain, ours = pair()
    for model in (plain, ours):
        torch.manual_seed(8)
        model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "up_proj"]))
        model.set_adapter("other")
        runs.shake(model, trainable_only=True)
    assert_same(plain, manual(ours, batch()), batch())


def test_dropout_that_comes_later_falls_back() -> None:
    plain, ours = pair(lora={"lora_dropout": 0.3})
    with own_forwards(ours) as calls:
        found = maths.loss_and_gradients(ours, batch())
    assert len(calls) == 2
    assert_same(plain, found, batch())
    with own_forwards(ours) as calls:
        found = logits(ours, batch())
    assert not calls, "there is no dropout in evaluation"
    assert maths.apart(found, logits(plain, batch())) <= TOLERANCE


def test_dropout_of_attention_falls_back_in_training() -> None:
    plain, ours = pair(attention_dropout=0.3)
    with own_forwards(ours) as calls:
        found = maths.loss_and_gradients(ours, batch())
    assert len(calls) == 2
    assert_same(plain, found, batch())
    with own_forwards(ours) as calls:
        found = logits(ours, batch())
    assert not calls
    assert maths.apart(found, logits(plain, batch())) <= TOLERANCE


# Ways of calling a model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_generation_with_a_cache(family) -> None:
    plain, ours = pair(family)
    prompt = {"input_ids": batch()["input_ids"][:2, :5]}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    prompt["attention_mask"][0, 0] = 0
    written = []
    for model in (plain, ours):
        model.eval()
        written.append(model.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=True))
    assert torch.equal(*written)
    with own_forwards(ours) as calls:
        assert torch.equal(ours.generate(**prompt, max_new_tokens=12, do_sample=False, use_cache=False), written[0])
    assert not calls


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows(family, side) -> None:
    plain, ours = pair(family)
    assert_same(plain, manual(ours, padded(side)), padded(side))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_rows(family) -> None:
    """Positions that start anew: every row has tables of its own, and transformers makes a mask of the documents."""
    plain, ours = pair(family)
    position_ids = torch.stack([torch.cat((torch.arange(n), torch.arange(11 - n))) for n in (4, 7, 11)])
    data = batch() | {"position_ids": position_ids.to(DEVICE)}
    assert_same(plain, manual(ours, data), data)


def test_two_micro_batches_add_up() -> None:
    plain, ours = pair()
    for model in (plain, ours):
        model.zero_grad()
        for rows in (slice(0, 2), slice(2, 3)):
            model(**{name: x[rows] for name, x in batch().items()}).loss.backward()
    gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients
    for name, p in ours.named_parameters():
        assert name not in gradients or maths.apart(p.grad, gradients[name]) <= TOLERANCE


@pytest.mark.parametrize("grads", [True, False])
def test_hidden_states_of_every_layer(grads) -> None:
    plain, ours = pair()
    with torch.set_grad_enabled(grads), own_forwards(ours) as calls:
        found = ours(**batch(), output_hidden_states=True).hidden_states
    assert not calls
    wanted = plain(**batch(), output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 3
    for one, other in zip(found, wanted, strict=True):
        assert maths.apart(one.detach(), other.detach()) <= TOLERANCE


def test_attention_weights_come_from_the_familys_forward() -> None:
    plain, ours = pair(attn_implementation="eager")
    with torch.no_grad():
        found, wanted = (model(**batch(), output_attentions=True) for model in (ours, plain))
    assert len(found.attentions) == len(wanted.attentions) == 2
    assert max(map(maths.apart, found.attentions, wanted.attentions)) <= TOLERANCE
    assert maths.apart(found.loss, wanted.loss) <= TOLERANCE


@pytest.mark.parametrize("lora", [None, False], ids=["LoRA", "full"])
def test_evaluation(lora, kernel_set) -> None:
    plain, ours = pair(kernel_set=kernel_set, lora=lora)
    keep(ours, 0)
    with own_forwards(ours) as calls:
        found = logits(ours, batch())
    assert not calls
    assert maths.apart(found, logits(plain, batch())) <= TOLERANCE
    with torch.inference_mode():
        assert maths.apart(ours(**batch()).loss, plain(**batch()).loss) <= TOLERANCE


def test_gradients_of_embeddings() -> None:
    """Through every layer down to the input, which itself is trained."""
    plain, ours = pair()
    found = []
    for model in (plain, ours):
        drawn = torch.Generator().manual_seed(6)
        embeddings = torch.randn(2, 6, SIZES["hidden_size"], generator=drawn).to(DEVICE).requires_grad_()
        model(inputs_embeds=embeddings, labels=batch(2, 6)["labels"]).loss.backward()
        found.append(embeddings.grad)
    assert maths.apart(*found) <= TOLERANCE


def test_autocast_of_32_bit_weights_falls_back() -> None:
    plain, ours = pair(lora=False)
    with torch.autocast(DEVICE.type, torch.bfloat16), own_forwards(ours) as calls:
        found = maths.loss_and_gradients(ours, batch())
        wanted = maths.loss_and_gradients(plain, batch())
    assert len(calls) == 4
    assert_bitwise(found, wanted)


def test_16_bit_weights_are_no_further_from_the_truth() -> None:
    """bfloat16 against the same model in float64, over all gradients; PEFT keeps A and B in float32."""
    plain = adapt(build().to(torch.bfloat16))
    exact = copy.deepcopy(plain).double()
    ours = patched(plain)
    _, truth = maths.loss_and_gradients(exact, batch())

    def far(found: dict[str, torch.Tensor]) -> float:
        return maths.apart(
            torch.cat([found[n].double().flatten() for n in truth]), torch.cat([truth[n].flatten() for n in truth])
        )

    mine, theirs = far(manual(ours, batch())[1]), far(maths.loss_and_gradients(plain, batch())[1])
    assert mine <= 1.1 * theirs


def test_deep_copies_and_saved_weights_are_plain() -> None:
    plain, ours = pair()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert_same(plain, manual(copy.deepcopy(ours), batch()), batch())
    other = adapt(build())
    other.load_state_dict(ours.state_dict())
    assert_same(plain, maths.loss_and_gradients(other, batch()), batch())


# Runs that it does not fit -----------------------------------------------------------------------------------------

OPS = {"rms_norm", "mlp", "attention"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["adapter.dropout=0.1"], "reference.decoder_layer has no LoRA dropout"),
        (["adapter.variant=dora"], "reference.decoder_layer has no DoRA"),
        (["+quantizer=bnb_int8"], "reference.decoder_layer does not read bnb_int8 weights"),
        (
            ["adapter.modules_to_save=[q_proj]", "adapter.targets=[v_proj]"],
            "reference.decoder_layer has no projections that are trained whole beside LoRA",
        ),
    ],
)
def test_a_run_that_does_not_fit_says_why_and_keeps_the_other_kernels(words, reason) -> None:
    words = ["+model=llama", "model.tiny=true", "model.dtype=float32", "kernels=[reference]", *words]
    report = runs.loaded(words).patches
    assert Skip(role="decoder_layer", module="LlamaDecoderLayer", reason=reason) in report.skipped
    assert {claim.role for claim in report.claims} == OPS | {"lm_head"}


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"hidden_act": "relu"}, "has no kernel for the activation relu"),
        ({"attention_dropout": 0.1}, "has no dropout"),
        ({}, None),
    ],
)
def test_a_config_that_does_not_fit_says_why(more, reason) -> None:
    _, plan = runs.prepared(["+model=llama", "model.tiny=true", "model.dtype=float32", "kernels=[reference]"])
    roles = [role for role in plan.family.roles if role.name in {"rms_norm", "attention", "decoder_layer"}]
    report = patch(build(**more), roles, plan.kernels, plan.device, Phase.BASE, plan=plan)
    claimed = {claim.module for claim in report.claims if ".layers." in claim.module}
    reasons = [skip.reason for skip in report.skipped if skip.role == "decoder_layer"]
    if reason is None:
        assert not claimed
        assert not reasons
    else:
        assert reasons == [f"reference.decoder_layer {reason}"]
        assert {path.rpartition(".")[2] for path in claimed} == {
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn",
        }


# Against another process -------------------------------------------------------------------------------------------

UNTOUCHED = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

torch.manual_seed(5)
model = Qwen3ForCausalLM(Qwen3Config(**torch.load(sys.argv[1])["sizes"]))
lora = LoraConfig(task_type="CAUSAL_LM", r=6, lora_alpha=9, target_modules="all-linear")
model = get_peft_model(model, lora)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
ids = torch.randint(3, 101, (2, 17))
mask = torch.ones_like(ids)
mask[1, -5:] = 0
batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}
loss = model.train()(**batch).loss
loss.backward()
gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
assert not [name for name in sys.modules if name.startswith(("ftcore", "trl"))]
torch.save({"batch": batch, "loss": loss.detach(), "grads": gradients, "weights": model.state_dict()}, sys.argv[2])
"""


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process that never imports ftcore computes, on the CPU."""
    folder: Path = tmp_path_factory.mktemp("untouched")
    (folder / "untouched.py").write_text(UNTOUCHED, encoding="utf-8")
    torch.save({"sizes": SIZES}, folder / "sizes.pt")
    command = [sys.executable, *(str(folder / name) for name in ("untouched.py", "sizes.pt", "found.pt"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


@pytest.mark.slow
def test_a_process_without_ftcore_computes_the_same(untouched, kernel_set) -> None:
    model = adapt(build("qwen3"), r=6, lora_alpha=9)
    model.load_state_dict(untouched["weights"])
    data = {name: x.to(DEVICE) for name, x in untouched["batch"].items()}
    loss, gradients = manual(patched(model, "qwen3", kernel_set), data)
    assert maths.apart(loss, untouched["loss"]) <= TOLERANCE
    assert set(gradients) == set(untouched["grads"])
    assert max(maths.apart(gradients[name], untouched["grads"][name]) for name in gradients) <= TOLERANCE
    assert all(gradient.any() for gradient in gradients.values())
