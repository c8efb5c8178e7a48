"""Gated activation between LoRA's products: values, both in-place gradients, against fp64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import lora_glu as module
from ftcore_kernels.reference import lora_glu as reference
from ftcore_kernels.reference.lora_rope import Update

SEPARATE, FUSED = (0, 1), (0, 0)
ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
}


def truth(activation, blocks):
    def apply(gate_up, dout, xa, b, dxa, a):
        gate_up.requires_grad_()
        both = gate_up
        if b is not None:
            rank, width = b.shape[1], gate_up.shape[1] // 2
            parts = [xa[:, k * rank : (k + 1) * rank] @ b[i * width : (i + 1) * width].T for i, k in enumerate(blocks)]
            both = both + torch.cat(parts, 1)
        gate, up = both.chunk(2, 1)
        out = ACTIVATIONS[activation](gate) * up
        (dgate_up,) = torch.autograd.grad(out, gate_up, dout if a is None else dout + dxa @ a)
        return {"out": out, "again": out, "dgate_up": dgate_up}

    return apply


def steps(which, activation, blocks):
    def apply(gate_up, dout, xa, b, dxa, a):
        update = None if b is None else Update(xa, b, blocks)
        out = which.lora_glu(gate_up, activation, update)
        assert which.lora_glu_backward(dout, gate_up, activation, update, dxa, a) is None
        return {"out": out, "again": dout, "dgate_up": gate_up}

    return apply


def make(rows, width, dtype, device, rank=None, down_rank=None, blocks=SEPARATE):
    def draw(*sizes, scale=1.0):
        return (torch.randn(*sizes) * scale).to(device, dtype)

    return {
        "gate_up": draw(rows, 2 * width, scale=2.0),
        "dout": draw(rows, width),
        "xa": draw(rows, (max(blocks) + 1) * rank) if rank else None,
        "b": draw(2 * width, rank, scale=rank**-0.5) if rank else None,
        "dxa": draw(rows, down_rank) if down_rank else None,
        "a": draw(down_rank, width, scale=down_rank**-0.5) if down_rank else None,
    }


def check(compare_steps, tensors, activation="silu", blocks=SEPARATE):
    choice = activation, blocks
    compare_steps(steps(module, *choice), steps(reference, *choice), truth(*choice), tensors)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (37, 128), (33, 131), (97, 300), (300, 20), (0, 16)])
def test_shapes(compare_steps, device, dtype, shape, activation):
    check(compare_steps, make(*shape, dtype, device, 16, 16), activation)


@pytest.mark.parametrize("blocks", [SEPARATE, FUSED], ids=["separate", "fused"])
@pytest.mark.parametrize("ranks", [(None, None), (16, None), (None, 16), (32, 16), (16, 64), (64, 64)])
def test_ranks(compare_steps, device, dtype, ranks, blocks):
    check(compare_steps, make(35, 133, dtype, device, *ranks, blocks=blocks), "silu", blocks)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 64),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    rank=st.sampled_from([None, 16, 32]),
    down_rank=st.sampled_from([None, 16, 32]),
)
def test_any_small_shape(compare_steps, device, rows, width, activation, rank, down_rank):
    check(compare_steps, make(rows, width, torch.float32, device, rank, down_rank), activation)


def test_rows_with_gaps(compare_steps, device, dtype):
    """Columns of wider buffers, as `x A^T` of several projections is one."""
    tensors = make(19, 70, dtype, device, 16, 16)
    for name in ("xa", "dxa"):
        wide = torch.randn(19, tensors[name].shape[1] + 9).to(device, dtype)
        tensors[name] = wide[:, 4 : 4 + tensors[name].shape[1]]
    check(compare_steps, tensors)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # exp(6e4), whose reciprocal is the 0 that is meant
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extremes_stay_finite(device, dtype, activation):
    gate = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 30.0, -30.0, 100.0, -100.0, 6e4, -6e4])
    gate_up = torch.stack((gate, torch.full_like(gate, 0.5)), 0).reshape(1, -1).to(device, dtype)
    dout = torch.ones(1, len(gate)).to(device, dtype)
    expected = ACTIVATIONS[activation](gate.to(dtype).double()) * 0.5
    out = module.lora_glu(gate_up, activation)
    module.lora_glu_backward(dout, gate_up, activation)
    assert torch.equal(out, dout)
    assert gate_up.isfinite().all()
    torch.testing.assert_close(out[0].cpu().double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    slope = gate_up[0, : len(gate)].cpu().double() / 0.5
    assert slope[:2].tolist() == [0.5, 0.5]
    assert slope[4::2].tolist() == [1.0] * 3
    assert slope[5::2].abs().max() < 1e-6


@pytest.mark.parametrize("which", [module, reference], ids=["triton", "reference"])
def test_what_is_written_over(device, dtype, which):
    t = make(21, 50, dtype, device, 16, 16)
    before = {name: x.clone() for name, x in t.items()}
    update = Update(t["xa"], t["b"], SEPARATE)
    out = which.lora_glu(t["gate_up"], "silu", update)
    assert [name for name in t if not torch.equal(t[name], before[name])] == [], "the forward wrote over an input"
    which.lora_glu_backward(t["dout"], t["gate_up"], "silu", update, t["dxa"], t["a"])
    assert torch.equal(t["dout"], out)
    assert not torch.equal(t["gate_up"], before["gate_up"])
    assert [x for x in ("xa", "b", "dxa", "a") if not torch.equal(t[x], before[x])] == []


@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(huge, device, stride):
    rows = 2**31 // stride + 1
    t = make(rows, 24, torch.float16, device, 16, 16)
    xa, dxa = huge((rows, 32), (stride, 1)), huge((rows, 16), (stride, 1))
    results = []
    for small, down in ((xa, dxa), (xa.clone(), dxa.clone())):
        gate_up, dout, update = t["gate_up"].clone(), t["dout"].clone(), Update(small, t["b"], SEPARATE)
        out = module.lora_glu(gate_up, "silu", update)
        module.lora_glu_backward(dout, gate_up, "silu", update, down, t["a"])
        results.append((out, dout, gate_up))
    assert all(map(torch.equal, *results))


class _Activated(torch.autograd.Function):
    """The twin's own backward as autograd's; the second output brings in the gradient through `x A^T`."""

    @staticmethod
    def forward(ctx, gate_up, xa, b, a, activation):
        ctx.save_for_backward(gate_up, xa, b, a)
        ctx.activation = activation
        out = reference.lora_glu(gate_up, activation, Update(xa, b, SEPARATE))
        return out, out @ a.T

    @staticmethod
    def backward(ctx, dout, dxa):
        gate_up, xa, b, a = ctx.saved_tensors
        gate_up, dout = gate_up.clone(), dout.clone()
        reference.lora_glu_backward(dout, gate_up, ctx.activation, Update(xa, b, SEPARATE), dxa, a)
        return gate_up, None, None, None, None


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_twin_passes_gradcheck(activation):
    more = {"dtype": torch.float64}
    gate_up, xa, b, a = (torch.randn(*size, **more) for size in ((3, 10), (3, 8), (10, 4), (2, 5)))
    assert torch.autograd.gradcheck(lambda x: _Activated.apply(x, xa, b, a, activation), gate_up.requires_grad_())


def test_refusals(device):
    gate_up, dout = torch.randn(2, 8).to(device), torch.randn(2, 4).to(device)
    for which in (module, reference):
        with pytest.raises(ValueError, match="activation is 'relu'"):
            which.lora_glu(gate_up, "relu")
        with pytest.raises(ValueError, match="activation is 'relu'"):
            which.lora_glu_backward(dout, gate_up, "relu")
    with pytest.raises(TypeError, match=r"gate_up is torch\.float64"):
        module.lora_glu(gate_up.double())
