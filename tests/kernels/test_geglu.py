"""GeGLU: values, gradients, views and roundings, against fp64 and against transformers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops import geglu as module
from ftcore_kernels.ops.geglu import geglu
from ftcore_kernels.reference.geglu import geglu as reference

FORMS = ["tanh", "none"]
ROUND = [True, False]


def formula(approximate):
    def exact(gate, up):
        return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up

    def tanh(gate, up):
        return gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) / 2 * up

    return tanh if approximate == "tanh" else exact


def make(shape, dtype, device):
    return tuple(torch.randn(shape).mul(2).to(device, dtype).requires_grad_() for _ in range(2))


def check(compare, gate, up, approximate="tanh", round_gelu=True):
    compare(
        lambda gate, up: geglu(gate, up, approximate, round_gelu),
        lambda gate, up: reference(gate, up, approximate, round_gelu),
        formula(approximate),
        (gate, up),
    )


@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("round_gelu", ROUND)
@pytest.mark.parametrize("shape", [(1, 1), (7, 131), (2, 2049), (0,), (0, 8), (3, 0)])
def test_values_and_gradients(compare, device, dtype, shape, approximate, round_gelu):
    check(compare, *make(shape, dtype, device), approximate, round_gelu)


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


@pytest.mark.parametrize("width", [37, 2100])
def test_halves_of_a_fused_buffer(compare, device, dtype, width):
    fused = torch.randn(5, 2 * width).to(device, dtype)
    gate, up = (half.requires_grad_() for half in fused.chunk(2, -1))
    assert [_launch.as_rows(half).tensor.data_ptr() for half in (gate, up)] == [gate.data_ptr(), up.data_ptr()]
    check(compare, gate, up)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 9),
    width=st.integers(0, 64),
    pad=st.integers(0, 3),
    approximate=st.sampled_from(FORMS),
    round_gelu=st.booleans(),
)
def test_any_small_shape(compare, device, rows, width, pad, approximate, round_gelu):
    gate, up = (torch.randn(rows, width + pad).to(device)[:, pad:].requires_grad_() for _ in range(2))
    check(compare, gate, up, approximate, round_gelu)


def test_rows_of_several_blocks(compare, device, dtype, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    gate, up = (torch.randn(5, 80).to(device, dtype)[:, 3:].requires_grad_() for _ in range(2))
    check(compare, gate, up)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("approximate", FORMS)
@pytest.mark.parametrize("round_gelu", ROUND)
def test_extreme_gates(device, dtype, approximate, round_gelu):
    big = torch.finfo(dtype).max
    gate = torch.tensor([-big, -100.0, -0.0, 0.0, 100.0, big]).to(device, dtype).requires_grad_()
    up = torch.full_like(gate, 0.5).requires_grad_()
    out = geglu(gate, up, approximate, round_gelu)
    torch.testing.assert_close(out, gate.clamp_min(0) * up)
    dgate, dup = torch.autograd.grad(out, (gate, up), torch.ones_like(out))
    # Eager's own tanh gradient is NaN where the square of a gate overflows.
    torch.testing.assert_close(dgate, torch.tensor([0, 0, 0.25, 0.25, 0.5, 0.5]).to(device, dtype))
    torch.testing.assert_close(dup, gate.detach().clamp_min(0))


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("approximate", FORMS)
def test_nan_stays_nan(device, dtype, approximate):
    gate, up = (torch.full((3,), math.nan).to(device, dtype).requires_grad_() for _ in range(2))
    out = geglu(gate, up.detach().fill_(1).requires_grad_(), approximate)
    assert out.isnan().all()
    assert torch.autograd.grad(out.sum(), gate)[0].isnan().all()


@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(compare, huge, device, stride):
    rows = 2**31 // stride + 1
    gate, up, dout = (huge((rows, 8), (stride, 1)) for _ in range(3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    check(compare, gate, up)
    assert all(
        map(
            torch.equal,
            torch.autograd.grad(geglu(gate, up), (gate, up), dout),
            torch.autograd.grad(geglu(gate, up), (gate, up), dout.clone()),
        )
    )


@pytest.mark.parametrize(("approximate", "name"), [("tanh", "gelu_pytorch_tanh"), ("none", "gelu")])
def test_parity_with_transformers(device, dtype, approximate, name):
    from transformers.activations import ACT2FN

    gate, up = make((9, 512), dtype, device)
    theirs = ACT2FN[name](gate) * up  # the line of GemmaMLP.forward
    dout = torch.randn_like(theirs)
    their_grads = torch.autograd.grad(theirs, (gate, up), dout)
    same = reference(gate, up, approximate)
    assert torch.equal(same, theirs)
    assert all(map(torch.equal, torch.autograd.grad(same, (gate, up), dout), their_grads))
    ours = geglu(gate, up, approximate)
    for close, expected in zip(
        (ours, *torch.autograd.grad(ours, (gate, up), dout)), (theirs, *their_grads), strict=True
    ):
        # In the tails eager loses digits to 1 + tanh(-u) and 1 - tanh(u) ** 2.
        torch.testing.assert_close(close, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_one_rounding_is_more_exact(device):
    gate, up = make((64, 128), torch.float16, device)
    exact = formula("tanh")(gate.detach().double(), up.detach().double())
    errors = [(geglu(gate, up, round_gelu=rounded).detach().double() - exact).norm() for rounded in ROUND]
    assert errors[1] < 0.9 * errors[0]


def test_refusals(device):
    gate, up = make((2, 8), torch.float32, device)
    for function in (geglu, reference):
        with pytest.raises(ValueError, match="'tanh' or 'none'"):
            function(gate, up, "erf")
    with pytest.raises(ValueError, match="must agree"):
        geglu(gate, up[:1])
    with pytest.raises(ValueError, match="must agree"):
        geglu(gate, up.half())
