"""The fused head on whole tiny models against transformers' own forward, and against TRL's fused head."""

from __future__ import annotations

import copy
import inspect
import os

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from ftcore import Role
from ftcore.patching import unpatch
from ftcore.specs import Claim
from ftcore.testing import maths, runs
from ftcore_kernels.layers import lm_head
from ftcore_kernels.layers.lm_head_parts import logit_form

DEVICE = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu")
SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "use_cache": False,
    "pad_token_id": 0,
}
ROLE = Role("lm_head", "")
IMPLEMENTATIONS = {"reference": lm_head.install_reference, "triton": lm_head.install_triton}


@pytest.fixture(params=["reference", "triton"])
def install(request):
    if request.param == "triton":
        maths.needs_triton("triton")
    return IMPLEMENTATIONS[request.param]


def tiny(name: str = "Llama", **more) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{name}Config")(**SIZES | more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    runs.shake(model)
    return model.to(DEVICE).train()


def batch(rows: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    """Rows with 0, 1, ... supervised tokens more than the one before."""
    ids = torch.randint(1, 101, (rows, length), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : length - 2 * row] = -100
    return {"input_ids": ids, "labels": labels}


def pair(install, name: str = "Llama", **more) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedModel]:
    plain = tiny(name, **more)
    ours = copy.deepcopy(plain)
    install(ours, ROLE)
    return plain, ours


def assert_same(ours, plain, data, tolerance: float = 1e-5) -> None:
    loss, gradients = maths.loss_and_gradients(plain, data)
    our_loss, our_gradients = maths.loss_and_gradients(ours, data)
    assert maths.apart(our_loss, loss) <= tolerance
    assert set(our_gradients) == set(gradients)
    assert max(maths.apart(our_gradients[name], gradients[name]) for name in gradients) <= tolerance


@pytest.mark.parametrize("kernel_set", ["reference", "triton"])
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm2"])  # the last has tied embeddings
def test_runs_claim_the_head_and_compute_the_same(family, adapter, kernel_set) -> None:
    words = [f"+model={family}", "model.tiny=true", "model.dtype=float32", f"adapter={adapter}"]
    claimed = maths.assert_same_maths(words, kernel_set, 1e-5)
    assert Claim(module="", role="lm_head", kernel=f"{kernel_set}.linear_cross_entropy") in claimed.claims


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 17}, {"num_items_in_batch": torch.tensor(17)}])
def test_loss_and_gradients(install, tied, more) -> None:
    plain, ours = pair(install, tie_word_embeddings=tied)
    assert_same(ours, plain, batch() | more)
    out = ours(**batch())
    assert out.logits is None
    assert out.loss.dtype == torch.float32


def test_shifted_labels(install) -> None:
    plain, ours = pair(install)
    data = batch()
    shifted = torch.nn.functional.pad(data["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    data = {"input_ids": data["input_ids"], "shift_labels": shifted}
    loss = ours(**data).loss
    torch.testing.assert_close(loss, plain(**data, labels=data["input_ids"]).loss)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.7}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Cohere", {"logit_scale": 0.2, "tie_word_embeddings": True}),
    ],
)
def test_cap_and_scale_of_the_logits(install, name, more) -> None:
    plain, ours = pair(install, name, **more)
    assert logit_form(ours.config) != {"softcap": 0.0, "scale": 1.0}
    assert_same(ours, plain, batch())


def test_bias(install) -> None:
    plain = tiny()
    plain.lm_head = nn.Linear(32, 101).to(DEVICE)
    ours = copy.deepcopy(plain)
    install(ours, ROLE)
    assert_same(ours, plain, batch())
    assert ours.lm_head.bias.grad.norm() > 0


@pytest.mark.parametrize("mode", [{}, {"fused_loss": True}, {"fused_lm_head": True}])
def test_no_supervised_token(install, mode) -> None:
    _, ours = pair(install)
    data = batch()
    data["labels"][:, 1:] = -100  # the first label is never predicted
    for more in ({}, {"num_items_in_batch": torch.tensor(0)}):
        ours.zero_grad()
        loss = ours(**data, **mode, **more).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(p.grad is None or not p.grad.any() for p in ours.parameters())
        assert ours.model.norm.weight.grad is not None


@pytest.mark.parametrize("mode", [{}, {"fused_loss": True}])
@pytest.mark.parametrize("split", [[4], [1, 1, 1, 1], [3, 1], [1, 3], [2, 2]])
def test_any_split_in_micro_batches_is_the_same_step(install, split, mode) -> None:
    """Rows of 0, 2, 4 and 6 supervised tokens; one of the splits has a micro-batch without any."""
    plain, ours = pair(install)
    data = batch(rows=4)
    total = (data["labels"][:, 1:] != -100).sum()
    loss, gradients = maths.loss_and_gradients(plain, data)
    losses = 0.0
    for part in zip(*(x.split(split) for x in data.values()), strict=True):
        out = ours(**dict(zip(data, part, strict=True)), num_items_in_batch=total, **mode)
        out.loss.backward()
        losses += out.loss.item()
    # On a GPU products of other sizes are other kernels, which add up in another order.
    tolerance = 1e-6 if DEVICE.type == "cpu" else 1e-5
    assert losses == pytest.approx(loss.item(), rel=tolerance)
    far = {n: maths.apart(p.grad.cpu(), gradients[n]) for n, p in ours.named_parameters()}
    assert max(far.values()) <= tolerance, far


def test_logits_are_there_where_they_are_wanted(install) -> None:
    plain, ours = pair(install)
    data = batch()
    for call in ({"input_ids": data["input_ids"]}, data | {"logits_to_keep": data["input_ids"].shape[1]}):
        assert torch.equal(ours(**call).logits, plain(**call).logits)
    plain.eval(), ours.eval()
    with torch.no_grad():
        assert torch.equal(ours(**data).logits, plain(**data).logits)
        assert torch.equal(ours(**data).loss, plain(**data).loss)
    prompt = {"input_ids": data["input_ids"], "attention_mask": torch.ones_like(data["input_ids"])}
    words = {"max_new_tokens": 4, "do_sample": False, "use_cache": True}
    assert torch.equal(ours.generate(**prompt, **words), plain.generate(**prompt, **words))
    with pytest.raises(ValueError, match="model_kwargs"):
        ours.generate(**prompt, **words, no_such_argument=1)


def test_what_the_op_does_not_cover_is_the_class_s_own(install) -> None:
    plain, ours = pair(install)
    data = batch()
    names = list(inspect.signature(ours.forward).parameters)
    assert names == list(inspect.signature(plain.forward).parameters)
    positions = [data.get(name) for name in names[: names.index("labels") + 1]]
    assert ours(*positions).logits is None
    with pytest.raises(TypeError, match="by position"):
        ours(*positions, *[None] * 20)
    assert len(ours(**data, return_dict=False)) == len(plain(**data, return_dict=False)) == 2
    other = {"input_ids": data["input_ids"], "labels": data["labels"].clamp(min=0), "ignore_index": 0}
    assert torch.equal(ours(**other).logits, plain(**other).logits)
    ours.lm_head.register_forward_hook(lambda *_: None)
    assert ours(**data).logits is not None
    ours.lm_head._forward_hooks.clear()
    ours.loss_function = lambda **_: torch.zeros((), device=DEVICE)
    assert ours(**data).logits is not None


def test_calls_that_make_no_sense_are_named(install) -> None:
    _, ours = pair(install)
    with pytest.raises(TypeError, match="need labels"):
        ours(batch()["input_ids"], fused_lm_head=True)
    with pytest.raises(NotImplementedError, match="router"):
        ours(**batch(), fused_loss=True, output_router_logits=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shifted", [False, True])
def test_answers_what_trl_s_head_answers(install, temperature, shifted) -> None:
    theirs, ours = pair(install)
    add_fused_lm_head(theirs, temperature=temperature, outputs=("log_probs", "entropy", "is_top1"))
    getattr(ours, lm_head.SETTINGS).temperature = temperature
    data = batch()
    if shifted:
        data["shift_labels"] = data.pop("labels").roll(-1, 1)
    a, b = ours(**data, fused_lm_head=True), theirs(**data, fused_lm_head=True)
    assert {f for f in vars(b) if getattr(b, f) is not None} == {f for f in vars(a) if getattr(a, f) is not None}
    for name in ("log_probs", "entropy", "is_top1", "label_mask", "loss"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6, msg=name)
    upstream = torch.randn(a.log_probs.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    for model, out in ((ours, a), (theirs, b)):
        (out.log_probs * upstream).sum().backward()
        assert model.lm_head.weight.grad.norm() > 0
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert maths.apart(p.grad, q.grad) <= 1e-5, name


def test_sums_for_the_metrics(install) -> None:
    _, ours = pair(install)
    tokens, sums = ours(**batch(), fused_lm_head=True), ours(**batch(), fused_loss=True)
    assert sums.tokens == tokens.label_mask.sum() == 6
    assert sums.top1_sum == tokens.is_top1.sum()
    torch.testing.assert_close(sums.entropy_sum, tokens.entropy.sum())
    torch.testing.assert_close(sums.loss, tokens.loss)


@pytest.mark.parametrize("mode", [{}, {"fused_loss": True}, {"fused_lm_head": True}])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype(weights, mode) -> None:
    """The interpreter of Triton truncates to bf16, so only the reference is tried here."""
    plain, ours = pair(lm_head.install_reference)
    plain.to(weights), ours.to(weights)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        theirs, mine = plain(**batch()).loss, ours(**batch(), **mode).loss
    (theirs.backward(), mine.backward())
    assert maths.apart(mine.detach(), theirs.detach()) <= 2e-3
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == weights
        assert maths.apart(p.grad, q.grad) <= 3e-2, name


def test_a_head_in_another_dtype_than_the_hidden_states() -> None:
    """As where the head stayed in float32 and the rest is 16-bit: eager PyTorch refuses this."""
    _, ours = pair(lm_head.install_reference)
    whole = ours(**batch()).loss
    ours.model.to(torch.bfloat16)
    loss = ours(**batch()).loss
    loss.backward()
    assert maths.apart(loss.detach(), whole.detach()) <= 1e-2
    assert ours.lm_head.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("mode", [{"fused_loss": True}, {"fused_lm_head": True}, {}])
@pytest.mark.parametrize("kind", ["adapter", "trained whole"])
def test_peft_on_the_head(install, kind, mode) -> None:
    """An adapter on the head is computed by the class's own forward; a head that is trained whole is fused."""
    plain, ours = pair(install)
    where = {"target_modules": ["q_proj", "lm_head"]} if kind == "adapter" else {"modules_to_save": ["lm_head"]}
    models = []
    for model in (plain, ours):
        config = LoraConfig(**{"target_modules": ["q_proj"], **where}, r=4, init_lora_weights=False)
        torch.manual_seed(6)
        models.append(get_peft_model(model, config).train())
    runs.shake(models[0], trainable_only=True)
    models[1].load_state_dict(models[0].state_dict())
    data = batch()
    assert (models[1](**data).logits is None) == (kind == "trained whole")
    for other in (False, True):
        if other:  # the adapter off: the original head
            with models[0].disable_adapter(), models[1].disable_adapter():
                torch.testing.assert_close(models[1](**data, **mode).loss, models[0](**data).loss)
            continue
        losses = models[0](**data).loss, models[1](**data, **mode).loss
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        for (name, p), q in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
            assert p.requires_grad == (p.grad is not None), name
            assert p.grad is None or maths.apart(p.grad, q.grad) <= 1e-5, name


def test_the_supervised_rows_are_found_before_the_backbone_runs() -> None:
    """On a GPU that wait costs nothing then; the op is given them, so it does not wait again."""
    order = []

    def spy(*args, rows, **options):
        order.append(("op", rows.tolist()))
        return args[0].sum()

    model = tiny()
    model.forward = lm_head.forward_of(lm_head.FusedHead(type(model).forward, spy, spy)).__get__(model)
    model.model.register_forward_pre_hook(lambda *_: order.append("backbone"))
    nonzero = torch.nonzero
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "nonzero", lambda x: order.append("rows") or nonzero(x))
        model(**batch())
    assert order == ["rows", "backbone", ("op", [15, 16, 22, 23, 24, 25])]


def test_a_copy_has_settings_of_its_own_and_the_head_comes_off() -> None:
    _, ours = pair(lm_head.install_reference)
    other = copy.deepcopy(ours)
    getattr(other, lm_head.SETTINGS).temperature = 0.5
    a, b = (model(**batch(), fused_lm_head=True).log_probs for model in (ours, other))
    assert not torch.allclose(a, b)
    assert unpatch(ours) == 1
    assert ours(**batch()).logits is not None
