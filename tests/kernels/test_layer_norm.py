"""Layer normalisation: values, gradients, views and limits, against fp64 and against torch.nn.LayerNorm."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import rms_norm as tiles
from ftcore_kernels.ops.layer_norm import layer_norm
from ftcore_kernels.reference.layer_norm import layer_norm as reference

EPS = 1e-5


def formula(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    return out if bias is None else out + bias


def make(shape, dtype, device, other_dtype=None):
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    return x, *(torch.randn(shape[-1]).to(device, other_dtype or dtype).requires_grad_() for _ in range(2))


def check(compare, x, weight, bias):
    # In a row of few elements the input gradient is a difference of near-equal numbers unless eps is large.
    eps = EPS if x.shape[-1] > 4 else 1.0
    tensors = (x, weight) if bias is None else (x, weight, bias)
    compare(
        lambda x, weight, bias=None: layer_norm(x, weight, bias, eps),
        lambda x, weight, bias=None: reference(x, weight, bias, eps),
        lambda x, weight, bias=None: formula(x, weight, bias, eps),
        tensors,
    )


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 127), (37, 128), (64,), (0, 16), (2, 0, 16)])
def test_values_and_gradients(compare, device, dtype, shape, with_bias):
    x, weight, bias = make(shape, dtype, device)
    check(compare, x, weight, bias if with_bias else None)


def test_rows_of_one_element_are_the_bias(device, dtype):
    x, weight, bias = make((3, 1), dtype, device)
    out = layer_norm(x, weight, bias, EPS)
    assert torch.equal(out, bias.expand(3, 1))
    assert not torch.autograd.grad(out.sum(), x)[0].any()


def test_no_columns(device, dtype):
    x, weight, bias = make((3, 0), dtype, device)
    out = layer_norm(x, weight, bias, EPS)
    assert out.shape == (3, 0)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), (x, weight, bias))] == [(3, 0), (0,), (0,)]


def test_wide_rows(compare, device, dtype):
    check(compare, *make((3, 4100), dtype, device))


def test_parameters_of_another_dtype(compare, device, dtype):
    check(compare, *make((7, 48), dtype, device, torch.float16 if dtype == torch.float32 else torch.float32))


@pytest.mark.parametrize("frozen", [(1,), (2,), (1, 2)], ids=["weight", "bias", "both"])
def test_frozen_parameters(compare, device, dtype, frozen):
    tensors = make((9, 40), dtype, device)
    check(compare, *(x.detach() if i in frozen else x for i, x in enumerate(tensors)))


VIEWS = {
    "row stride": lambda: torch.randn(6, 5, 50)[..., 7:40],
    "transposed": lambda: torch.randn(3, 4, 5, 16).transpose(1, 2),
    "three strides": lambda: torch.randn(4, 6, 8, 9)[1:3, ::2, 1:7],
    "last dim strided": lambda: torch.randn(5, 66)[:, ::2],
    "expanded rows": lambda: torch.randn(1, 21).expand(4, 21),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(compare, device, dtype, view):
    x = VIEWS[view]().to(dtype)
    # .to(device) would make some of these dense; rebuild the strides there.
    x = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x) if 0 not in x.stride() else x
    x = x.to(device).requires_grad_()
    check(compare, x, *(torch.randn(2 * x.shape[-1]).to(device, dtype)[::2].requires_grad_() for _ in range(2)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(0, 40), width=st.integers(5, 64), with_bias=st.booleans())
def test_any_small_shape(compare, device, rows, width, with_bias):
    x, weight, bias = make((rows, width), torch.float32, device)
    check(compare, x, weight, bias if with_bias else None)


def test_partial_sums_of_many_programs(compare, device, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 64)
    check(compare, *make((101, 32), dtype, device))


def test_a_large_mean_does_not_cancel(device):
    """The mean of squares less the square of the mean would be all rounding error here."""
    x, weight, bias = make((4, 100), torch.float32, device)
    shifted = x.detach() + 4096  # exact to 2^-11
    exact = formula(*(tensor.detach().double() for tensor in (shifted, weight, bias)), EPS)
    torch.testing.assert_close(layer_norm(shifted, weight, bias, EPS).double(), exact, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(compare, huge, device, stride):
    rows = 2**31 // stride + 1
    x = huge((rows, 8), (stride, 1)).requires_grad_()
    weight, bias = (torch.randn(8).to(device, torch.float16).requires_grad_() for _ in range(2))
    check(compare, x, weight, bias)
    dout = huge((rows, 8), (stride, 1))
    for ours, theirs in zip(
        torch.autograd.grad(layer_norm(x, weight, bias, EPS), (x, weight, bias), dout),
        torch.autograd.grad(layer_norm(x, weight, bias, EPS), (x, weight, bias), dout.clone()),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_parity_with_torch(device, dtype):
    x, weight, bias = make((3, 5, 96), dtype, device)
    norm = torch.nn.LayerNorm(96, eps=EPS).to(device, dtype)
    norm.weight.data.copy_(weight.detach())
    norm.bias.data.copy_(bias.detach())
    theirs = norm(x)
    dout = torch.randn_like(theirs)
    their_grads = torch.autograd.grad(theirs, (x, norm.weight, norm.bias), dout)
    same = reference(x, weight, bias, EPS)
    assert torch.equal(same, theirs)
    assert all(map(torch.equal, torch.autograd.grad(same, (x, weight, bias), dout), their_grads))
    ours = layer_norm(x, weight, bias, EPS)
    torch.testing.assert_close(ours, theirs, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_refusals(device):
    x, weight, bias = make((2, 8), torch.float32, device)
    with pytest.raises(ValueError, match="weight has shape"):
        layer_norm(x, weight[:7], bias, EPS)
    with pytest.raises(ValueError, match="bias has shape"):
        layer_norm(x, weight, bias[:7], EPS)
    with pytest.raises(TypeError, match=r"bias is torch\.float64"):
        layer_norm(x, weight, bias.double(), EPS)
    wide = torch.zeros(1, 32769, device=device)
    with pytest.raises(ValueError, match="limit of 32768"):
        layer_norm(wide, wide[0], None, EPS)
