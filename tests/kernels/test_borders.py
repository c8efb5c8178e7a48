"""LoRA's A below the weights: rows with a border in every step, and whose A stands there."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import DEVICE, base, batch, layers, manual, own_forwards, pair
from peft import LoraConfig
from test_decoder_layer import assert_same
from torch import nn

pytest.importorskip("triton")

from ftcore.testing import maths, runs
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.gradients import Gradients
from ftcore_kernels.layers.decoder.linear import Fused
from ftcore_kernels.layers.decoder.packing import pack
from ftcore_kernels.layers.decoder.sources import Source
from ftcore_kernels.layers.decoder.stack import border_of, stack
from ftcore_kernels.ops import lora_add, lora_glu, lora_grads, lora_rope
from ftcore_kernels.reference import lora_add as plain_add
from ftcore_kernels.reference import lora_glu as plain_glu
from ftcore_kernels.reference import lora_grads as plain_grads
from ftcore_kernels.reference import lora_rope as plain_rope
from ftcore_kernels.reference.lora_rope import HeadNorm, Heads, Update

# The steps -----------------------------------------------------------------------------------------------------------


def same(function, tight, *strided: str, **tensors) -> None:
    """A step computes bit for bit the same on rows with gaps as on contiguous ones, and leaves the gaps alone."""
    loose = {}
    for name, x in tensors.items():
        loose[name] = x
        if name in strided:
            buffer = torch.full((x.shape[0], x.shape[1] + 24), 7.0, device=x.device, dtype=x.dtype)
            loose[name] = buffer[:, : x.shape[1]].copy_(x)
    gaps = [loose[name]._base[:, loose[name].shape[1] :] for name in strided]
    found, expected = function(**loose), tight(**tensors)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert all((gap == 7.0).all() for gap in gaps)


def draw(dtype, *sizes):
    return torch.randn(*sizes).to(DEVICE, dtype)


@pytest.mark.parametrize("module", [lora_glu, plain_glu], ids=["triton", "reference"])
def test_gate_and_up_with_a_border(dtype, module) -> None:
    def run(gate_up, dout, xa, b):
        update = Update(xa, b, (0, 1))
        out = module.lora_glu(gate_up, "silu", update)
        module.lora_glu_backward(dout, gate_up, "silu", update)
        return out, dout, gate_up

    tensors = {"dout": draw(dtype, 37, 70), "xa": draw(dtype, 37, 32), "b": draw(dtype, 140, 16)}
    gate_up = draw(dtype, 37, 140)

    def fresh(**given):
        return run(**{name: x if name == "gate_up" else x.clone() for name, x in given.items()})

    same(fresh, lambda **t: fresh(**{**t, "gate_up": t["gate_up"].clone()}), "gate_up", gate_up=gate_up, **tensors)


@pytest.mark.parametrize("convention", [None, (0.0, False), (1.0, True)])
@pytest.mark.parametrize("module", [lora_rope, plain_rope], ids=["triton", "reference"])
def test_heads_with_a_border(dtype, module, convention) -> None:
    heads, length, rows = Heads(4, 2, 16), 7, 21
    norm = HeadNorm(draw(dtype, 16), draw(dtype, 16), 1e-6, *convention) if convention else None
    cos, sin, b = draw(dtype, 1, length, 16), draw(dtype, 1, length, 16), draw(dtype, heads.dim * 8, 16)
    grads = [draw(dtype, 3, n, length, 16) for n in (4, 2, 2)]

    def run(qkv, xa, out):
        update, raw = Update(xa, b, (0, 1, 2)), qkv.clone()
        turned = module.lora_rope(qkv, cos, sin, heads, update, norm)
        dqkv, *_ = module.lora_rope_backward(*grads, cos, sin, heads, raw if norm else None, update, norm, False, out)
        assert dqkv is out
        return turned, out

    given = {"qkv": draw(dtype, rows, 128), "xa": draw(dtype, rows, 48), "out": draw(dtype, rows, 128)}
    same(run, lambda **t: run(**{name: x.clone() for name, x in t.items()}), "qkv", "xa", "out", **given)


@pytest.mark.parametrize("function", [lora_add.lora_add, plain_add.lora_add], ids=["triton", "reference"])
def test_an_output_apart_from_a_product_with_a_border(dtype, function) -> None:
    residual, b, out = draw(dtype, 33, 50), draw(dtype, 50, 16), draw(dtype, 33, 50)

    def run(x, xa):
        before = x.clone()
        found = function(residual, x, xa, b, out)
        assert found is out and torch.equal(x, before)
        return (found.clone(),)

    same(
        run,
        lambda x, xa: (function(residual, x.clone(), xa, b),),
        "x",
        "xa",
        x=draw(dtype, 33, 50),
        xa=draw(dtype, 33, 16),
    )


@pytest.mark.parametrize("function", [lora_grads.lora_grads, plain_grads.lora_grads], ids=["triton", "reference"])
def test_the_gradient_of_xa_over_xa(dtype, function) -> None:
    """In the border beside dy, where xa stood."""
    widths, b = (40, 25), draw(dtype, 65, 16)
    buffer = draw(dtype, 300, 65 + 32)
    dy, xa = buffer[:, :65], buffer[:, 65:]
    expected = function(dy.clone(), xa.clone(), b, widths, (0.5, 2.0))
    dxa, db = function(dy, xa, b, widths, (0.5, 2.0), xa)
    assert dxa is xa
    assert torch.equal(dxa, expected[0]) and torch.equal(db, expected[1])


# The products --------------------------------------------------------------------------------------------------------


def sources(ranks=(4, None, 20), widths=(24, 8, 16), inputs=40, dtype=torch.float32):
    found = []
    for rank, width in zip(ranks, widths, strict=True):
        linear = nn.Linear(inputs, width, bias=width == 8, device=DEVICE, dtype=dtype)
        a, b = (nn.Parameter(draw(dtype, *size)) for size in ((rank or 1, inputs), (width, rank or 1)))
        found.append(Source(linear, a, b, 0.5 * width) if rank else Source(linear))
    return found


def stacked(found, spare=None) -> Fused:
    ranks = [source.a.shape[0] for source in found if source.a is not None]
    rows = border_of(len(found), max(1 << (max(ranks) - 1).bit_length(), 16)) if spare is None else spare
    return Fused(found, stack([source.base.weight for source in found], rows))


@pytest.mark.parametrize("ranks", [(4, None, 20), (100, 3, 5)], ids=["in kernels", "by products"])
@torch.no_grad()
def test_product_and_gradients(ranks) -> None:
    found = sources(ranks)
    x, dense = draw(torch.float32, 19, 40), Dense(plain_ops())
    results = []
    for fused in (stacked(found), Fused(found)):
        pack([fused], torch.float32)
        y, xa = fused.product(x, dense)
        update = fused.update(xa, 3)
        y_full = y.clone() if update is None else plain_rope.updated(y, tuple(fused.widths), update)
        dy = fused.rows(19, x).copy_(y_full)
        grads = Gradients()
        dxa = fused.shrink_grad(dy, xa, grads, plain_grads.lora_grads)
        dx = fused.product_grad(dy, dense, dxa)
        fused.gradients(grads, dy, x, dxa)
        results.append([y_full, xa.clone(), dxa.clone(), dx, *grads.of(fused.parameters())])
    assert [fused.border for fused in (stacked(found), Fused(found))] == [border_of(3, 32 if ranks[0] == 4 else 128), 0]
    for ours, theirs in zip(*results, strict=True):
        assert maths.apart(ours, theirs) <= 1e-6
    y = torch.cat([s.base(x) + (0 if s.a is None else x @ s.a.T @ s.b.T * s.scale) for s in found], 1)
    assert maths.apart(results[0][0], y) <= 1e-6


def plain_ops():
    class Ops:
        """Dense asks for what it dequantizes with: nothing here is quantized."""

    return Ops()


def test_a_stack_moves_values_and_keeps_identities() -> None:
    linears = [nn.Linear(6, width, bias=False, device=DEVICE) for width in (4, 3)]
    weights = [linear.weight for linear in linears]
    before = [weight.detach().clone() for weight in weights]
    found = stack(weights, 5)
    assert found is not None and found.spare == 5 and found.holds(weights)
    assert [linear.weight for linear in linears] == weights
    assert all(map(torch.equal, before, weights)) and not found.whole[7:].any()
    weights[1].data = weights[1].data.clone()
    assert not found.holds(weights)
    assert stack([nn.Linear(6, 2).weight, nn.Linear(5, 2).weight], 0) is None


def test_a_shorter_border_leaves_nothing_of_a_longer_one() -> None:
    found = stack([nn.Linear(6, 4, device=DEVICE).weight], 64)
    found.claim(48, "long").fill_(3.0)
    assert found.owner == "long"
    found.claim(16, "short").fill_(2.0)
    assert (found.whole[4:20] == 2.0).all() and not found.whole[20:].any()


@torch.no_grad()
def test_no_room_for_a_higher_rank() -> None:
    found = sources((40, 3, 5))
    fused = stacked(found, spare=48)
    assert fused.border == 0 and fused.stack is not None
    pack([fused], torch.float32)
    _, xa = fused.product(draw(torch.float32, 3, 40), Dense(plain_ops()))
    assert xa.shape == (3, 3 * 64)


# The layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_set", ["reference", "triton"])
def test_another_adapter_between_a_forward_and_its_backward(kernel_set) -> None:
    """As a reference model's turn in DPO: its A must not be in the border when the first one's backward comes."""
    maths.needs_triton(kernel_set)
    plain, ours = pair("llama", kernel_set)
    for model in (plain, ours):
        torch.manual_seed(8)
        model.add_adapter(
            "other", LoraConfig(task_type="CAUSAL_LM", r=16, target_modules=["q_proj", "o_proj", "up_proj"])
        )
        for name, parameter in model.named_parameters():
            if ".other." in name:
                parameter.data.normal_(generator=None, std=0.2)
    ours.load_state_dict(plain.state_dict())
    data = batch()
    loss, gradients = maths.loss_and_gradients(plain, data)
    ours.train()
    ours.zero_grad()
    with own_forwards(ours) as calls:
        ours_loss = ours(**data).loss
        ours.set_adapter("other")
        with torch.no_grad():
            other = ours(**data).loss
        ours.set_adapter("default")
        ours_loss.backward()
    assert not calls
    assert maths.apart(other, ours_loss.detach()) > 1e-3, "the adapters say the same: nothing was tested"
    assert maths.apart(ours_loss.detach(), loss) <= 1e-5
    far = {n: maths.apart(p.grad.cpu(), gradients[n]) for n, p in ours.named_parameters() if n in gradients}
    assert {name for name, away in far.items() if not away <= 1e-5} == set()


def test_weights_that_were_moved_are_multiplied_where_they_are() -> None:
    plain, ours = pair("llama")
    for layer in layers(ours):
        projection = layer.self_attn.v_proj.base_layer
        projection.weight.data = projection.weight.data.clone()
    assert_same(plain, manual(ours, batch()), batch())


def test_a_copy_of_the_weights_is_no_part_of_the_stack() -> None:
    plain, ours = pair("llama")
    twin = copy.deepcopy(base(ours))
    runs.shake(twin)
    assert_same(plain, manual(ours, batch()), batch())
