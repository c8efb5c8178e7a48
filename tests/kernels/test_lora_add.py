"""Residual, product and low-rank update in one sum, in the memory of the product, against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops.lora_add import lora_add
from ftcore_kernels.reference.lora_add import lora_add as reference


def truth(residual, x, xa, b):
    x = x if residual is None else x + residual
    return {"out": x if b is None else x + xa @ b.T}


def step(function):
    def apply(residual, x, xa, b):
        out = function(residual, x, xa, b)
        assert out.data_ptr() == x.data_ptr(), "the sum is not in the memory of x"
        return {"out": out}

    return apply


def make(rows, width, dtype, device, residual=True, rank=16):
    def draw(*sizes, scale=1.0):
        return (torch.randn(*sizes) * scale).to(device, dtype)

    return {
        "residual": draw(rows, width) if residual else None,
        "x": draw(rows, width),
        "xa": draw(rows, rank) if rank else None,
        "b": draw(width, rank, scale=rank**-0.5) if rank else None,
    }


@pytest.mark.parametrize("rank", [None, 16, 32, 64])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (37, 128), (33, 131), (97, 300), (300, 20), (0, 16), (3, 0)])
def test_values(compare_steps, device, dtype, shape, residual, rank):
    compare_steps(step(lora_add), step(reference), truth, make(*shape, dtype, device, residual, rank))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 64),
    residual=st.booleans(),
    rank=st.sampled_from([None, 16, 32]),
)
def test_any_small_shape(compare_steps, device, rows, width, residual, rank):
    tensors = make(rows, width, torch.float32, device, residual, rank)
    compare_steps(step(lora_add), step(reference), truth, tensors)


def test_rows_with_gaps(compare_steps, device, dtype):
    tensors = make(19, 70, dtype, device)
    tensors["xa"] = torch.randn(19, 40).to(device, dtype)[:, 5:21]
    compare_steps(step(lora_add), step(reference), truth, tensors)


@pytest.mark.parametrize("function", [lora_add, reference], ids=["triton", "reference"])
def test_writes_over_nothing_but_x(device, dtype, function):
    t = make(21, 50, dtype, device)
    before = {name: x.clone() for name, x in t.items()}
    function(**t)
    assert [name for name in t if not torch.equal(t[name], before[name])] == ["x"]


@pytest.mark.parametrize("function", [lora_add, reference], ids=["triton", "reference"])
def test_without_anything_to_add_x_stays(device, dtype, function):
    x = torch.randn(5, 33).to(device, dtype)
    before = x.clone()
    assert torch.equal(function(None, x), before)


@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(huge, device, stride):
    rows = 2**31 // stride + 1
    t = make(rows, 24, torch.float16, device)
    xa = huge((rows, 16), (stride, 1))
    far, near = (lora_add(t["residual"], t["x"].clone(), small, t["b"]) for small in (xa, xa.clone()))
    assert torch.equal(far, near)


def test_refusals(device):
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        lora_add(None, torch.randn(2, 3, dtype=torch.float64, device=device))
