"""SwiGLU: values, gradients, views and roundings, against fp64 and against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops import swiglu as module
from ftcore_kernels.ops.swiglu import swiglu
from ftcore_kernels.reference.swiglu import swiglu as reference

ROUND = [True, False]


def formula(gate, up):
    return gate * torch.sigmoid(gate) * up


def make(shape, dtype, device):
    return tuple(torch.randn(shape).mul(2).to(device, dtype).requires_grad_() for _ in range(2))


def check(compare, gate, up, round_silu=True):
    compare(
        lambda gate, up: swiglu(gate, up, round_silu),
        lambda gate, up: reference(gate, up, round_silu),
        formula,
        (gate, up),
    )


@pytest.mark.parametrize("round_silu", ROUND)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (7, 131), (3, 5, 64), (2, 2049), (0,), (0, 8), (3, 0)])
def test_values_and_gradients(compare, device, dtype, shape, round_silu):
    check(compare, *make(shape, dtype, device), round_silu)


VIEWS = {
    "sliced": lambda: torch.randn(6, 5, 33)[:, 1:],
    "transposed": lambda: torch.randn(7, 5).T,
    "three strides": lambda: torch.randn(4, 6, 8, 9)[1:3, ::2, 1:5],
    "last dim strided": lambda: torch.randn(5, 66)[:, ::2],
    "expanded": lambda: torch.randn(1, 21).expand(4, 21),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(compare, device, dtype, view):
    gate, up = (VIEWS[view]().to(device, dtype).requires_grad_() for _ in range(2))
    check(compare, gate, up)
    check(compare, gate, up.detach().contiguous().requires_grad_())


@pytest.mark.parametrize("width", [1, 37, 2100])
def test_halves_of_a_fused_buffer(compare, device, dtype, width):
    fused = torch.randn(5, 2 * width).to(device, dtype)
    gate, up = (half.requires_grad_() for half in fused.chunk(2, -1))
    assert [_launch.as_rows(half).tensor.data_ptr() for half in (gate, up)] == [gate.data_ptr(), up.data_ptr()]
    check(compare, gate, up)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(0, 9), width=st.integers(0, 64), pad=st.integers(0, 3), round_silu=st.booleans())
def test_any_small_shape(compare, device, rows, width, pad, round_silu):
    gate, up = (torch.randn(rows, width + pad).to(device)[:, pad:].requires_grad_() for _ in range(2))
    check(compare, gate, up, round_silu)


def test_rows_of_several_blocks(compare, device, dtype, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    gate, up = (torch.randn(5, 80).to(device, dtype)[:, 3:].requires_grad_() for _ in range(2))
    check(compare, gate, up)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("round_silu", ROUND)
def test_extreme_gates(device, dtype, round_silu):
    big = torch.finfo(dtype).max
    gate = torch.tensor([-big, -100.0, -0.0, 0.0, 100.0, big]).to(device, dtype).requires_grad_()
    up = torch.full_like(gate, 0.5).requires_grad_()
    dout = torch.ones_like(gate)
    ours, theirs = (f(gate, up, round_silu) for f in (swiglu, reference))
    torch.testing.assert_close(ours, theirs)
    grads = (torch.autograd.grad(out, (gate, up), dout) for out in (ours, theirs))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(compare, huge, device, stride):
    rows = 2**31 // stride + 1
    gate, up, dout = (huge((rows, 8), (stride, 1)) for _ in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    check(compare, gate, up)
    assert all(
        map(
            torch.equal,
            torch.autograd.grad(swiglu(gate, up), (gate, up), dout),
            torch.autograd.grad(swiglu(gate, up), (gate, up), dout.clone()),
        )
    )


def test_parity_with_transformers(device, dtype):
    from transformers.activations import ACT2FN

    gate, up = make((9, 512), dtype, device)
    theirs = ACT2FN["silu"](gate) * up  # the line of LlamaMLP.forward
    dout = torch.randn_like(theirs)
    their_grads = torch.autograd.grad(theirs, (gate, up), dout)
    same = reference(gate, up)
    assert torch.equal(same, theirs)
    assert all(map(torch.equal, torch.autograd.grad(same, (gate, up), dout), their_grads))
    ours = swiglu(gate, up)
    for close, expected in zip(
        (ours, *torch.autograd.grad(ours, (gate, up), dout)), (theirs, *their_grads), strict=True
    ):
        if dtype != torch.float32:  # bit for bit, but for the rare value whose exp() differs by more than a rounding
            assert (close == expected).float().mean() > 0.999
        torch.testing.assert_close(close, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_one_rounding_is_more_exact(device):
    gate, up = make((64, 128), torch.float16, device)
    exact = formula(gate.detach().double(), up.detach().double())
    errors = [(swiglu(gate, up, rounded).detach().double() - exact).norm() for rounded in ROUND]
    assert errors[1] < 0.9 * errors[0]


def test_refusals(device):
    gate, up = make((2, 8), torch.float32, device)
    with pytest.raises(ValueError, match="must agree"):
        swiglu(gate, up[:1])
    with pytest.raises(ValueError, match="must agree"):
        swiglu(gate, up.half())
