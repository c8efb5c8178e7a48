"""Residual addition with RMS normalisation: both outputs and all gradients, against fp64 and against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import rms_norm as tiles
from ftcore_kernels.ops.add_rms_norm import add_rms_norm
from ftcore_kernels.ops.rms_norm import rms_norm
from ftcore_kernels.reference.add_rms_norm import add_rms_norm as reference

EPS = 1e-6
CASTS = ["llama", "gemma"]


def formula(residual, x, weight, eps, offset):
    total = residual + x
    return total, total / (total.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (offset + weight)


def make(shape, dtype, device, weight_grad=True, weight_dtype=None):
    residual, x = (torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(2))
    return residual, x, torch.randn(shape[-1]).to(device, weight_dtype or dtype).requires_grad_(weight_grad)


def check(compare, residual, x, weight, cast="llama", offset=0.0):
    # In a row of one or two elements the input gradient is a difference of near-equal numbers unless eps is large.
    eps = EPS if x.shape[-1] > 2 else 1.0
    compare(
        lambda *tensors: add_rms_norm(*tensors, eps, offset, cast),
        lambda *tensors: reference(*tensors, eps, offset, cast),
        lambda *tensors: formula(*tensors, eps, offset),
        (residual, x, weight),
    )


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 127), (37, 128), (64,), (0, 16), (3, 0)])
def test_values_and_gradients(compare, device, dtype, shape, cast):
    check(compare, *make(shape, dtype, device), cast, offset=1.0 if cast == "gemma" else 0.0)


def test_wide_rows(compare, device, dtype):
    check(compare, *make((3, 4100), dtype, device))


@pytest.mark.parametrize("cast", CASTS)
def test_weight_of_another_dtype(compare, device, dtype, cast):
    other = torch.float16 if dtype == torch.float32 else torch.float32
    check(compare, *make((7, 48), dtype, device, weight_dtype=other), cast, 1.0)


def test_frozen_weight(compare, device, dtype):
    check(compare, *make((9, 40), dtype, device, weight_grad=False))


VIEWS = {
    "row stride": lambda: torch.randn(6, 5, 50)[..., 7:40],
    "transposed": lambda: torch.randn(3, 4, 5, 16).transpose(1, 2),
    "three strides": lambda: torch.randn(4, 6, 8, 9)[1:3, ::2, 1:5],
    "last dim strided": lambda: torch.randn(5, 66)[:, ::2],
    "expanded rows": lambda: torch.randn(1, 21).expand(4, 21),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(compare, device, dtype, view):
    def place(x):
        x = x.to(dtype)
        # .to(device) would make some of these dense; rebuild the strides there.
        dense = 0 in x.stride()
        return x.to(device) if dense else torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)

    residual, x = (place(VIEWS[view]()).requires_grad_() for _ in range(2))
    weight = torch.randn(x.shape[-1]).to(device, dtype).requires_grad_()
    check(compare, residual, x, weight)
    check(compare, residual.detach().contiguous().requires_grad_(), x, weight)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(rows=st.integers(0, 40), width=st.integers(1, 64), cast=st.sampled_from(CASTS), weight_grad=st.booleans())
def test_any_small_shape(compare, device, rows, width, cast, weight_grad):
    check(compare, *make((rows, width), torch.float32, device, weight_grad), cast, offset=0.5)


def test_partial_sums_of_many_programs(compare, device, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 64)
    check(compare, *make((101, 32), dtype, device))


@pytest.mark.parametrize("cast", CASTS)
def test_equals_the_sum_and_then_the_norm(device, dtype, cast):
    residual, x, weight = make((5, 96), dtype, device)
    total, normed = add_rms_norm(residual, x, weight, EPS, 1.0, cast)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(residual + x, weight, EPS, 1.0, cast))


def test_either_output_may_go_unused(device, dtype):
    residual, x, weight = make((5, 33), dtype, device)
    dout = torch.randn(5, 33).to(device, dtype)
    total, normed = add_rms_norm(residual, x, weight, EPS)
    dresidual, dx = torch.autograd.grad(total, (residual, x), dout, retain_graph=True)
    assert torch.equal(dresidual, dout)
    assert torch.equal(dx, dout)
    separate = rms_norm(residual + x, weight, EPS)
    for ours, theirs in zip(
        torch.autograd.grad(normed, (residual, x, weight), dout),
        torch.autograd.grad(separate, (residual, x, weight), dout),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_gradients_of_both_addends_are_one_computation_and_accumulate_apart(device, dtype):
    residual, x, weight = make((5, 33), dtype, device)
    for count in (1, 2):
        total, normed = add_rms_norm(residual, x, weight, EPS)
        (total.sum() + normed.sum()).backward()
        assert torch.equal(residual.grad, x.grad)
        if count == 1:
            first = x.grad.clone()
    assert torch.equal(x.grad, first + first)


@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(compare, huge, device, stride):
    rows = 2**31 // stride + 1
    residual, x = (huge((rows, 8), (stride, 1)).requires_grad_() for _ in range(2))
    weight = torch.randn(8).to(device, torch.float16).requires_grad_()
    check(compare, residual, x, weight)
    upstream = [huge((rows, 8), (stride, 1)) for _ in range(2)]
    for ours, theirs in zip(
        torch.autograd.grad(add_rms_norm(residual, x, weight, EPS), (residual, x, weight), upstream),
        torch.autograd.grad(
            add_rms_norm(residual, x, weight, EPS), (residual, x, weight), [dout.clone() for dout in upstream]
        ),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cast", CASTS)
def test_parity_with_transformers(device, dtype, cast):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    residual, x, weight = make((3, 5, 96), dtype, device)
    norm = {"llama": LlamaRMSNorm, "gemma": Gemma2RMSNorm}[cast](96, eps=EPS).to(device, dtype)
    norm.weight.data.copy_(weight.detach())
    theirs = residual + x
    theirs = theirs, norm(theirs)
    upstream = [torch.randn_like(out) for out in theirs]
    their_grads = torch.autograd.grad(theirs, (residual, x, norm.weight), upstream)
    for function, exact in ((reference, True), (add_rms_norm, False)):
        ours = function(residual, x, weight, EPS, 1.0 if cast == "gemma" else 0.0, cast)
        grads = torch.autograd.grad(ours, (residual, x, weight), upstream)
        if exact:
            assert all(map(torch.equal, (*ours, *grads), (*theirs, *their_grads)))
        else:
            assert torch.equal(ours[0], theirs[0])
            torch.testing.assert_close(ours[1], theirs[1], rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_refusals(device):
    residual, x, weight = make((2, 8), torch.float32, device)
    for function in (add_rms_norm, reference):
        with pytest.raises(ValueError, match="'llama' or 'gemma'"):
            function(residual, x, weight, EPS, cast="t5")
    with pytest.raises(ValueError, match="must agree"):
        add_rms_norm(residual.half(), x, weight, EPS)
    with pytest.raises(ValueError, match="must agree"):
        add_rms_norm(residual[:1], x, weight, EPS)
    with pytest.raises(ValueError, match="weight has shape"):
        add_rms_norm(residual, x, weight[:7], EPS)
    wide = torch.zeros(1, 32769, device=device)
    with pytest.raises(ValueError, match="limit of 32768"):
        add_rms_norm(wide, wide, wide[0], EPS)
