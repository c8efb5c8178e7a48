"""Both gradients of a low-rank update in one pass over the gradient of its product, against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops.lora_grads import lora_grads
from ftcore_kernels.reference.lora_grads import lora_grads as reference

SCALES = (0.7, 2.0, 1.3)


def truth(widths):
    """By autograd of the product itself, from B without the scale that the step is given with it."""

    def apply(dy, xa, b):
        xa.requires_grad_()
        parts = [rows / scale for rows, scale in zip(b.split(widths), SCALES, strict=False)]
        unscaled = torch.cat(parts).requires_grad_()
        small = zip(xa.chunk(len(widths), 1), unscaled.split(widths), SCALES, strict=False)
        y = torch.cat([x @ (scale * rows).T for x, rows, scale in small], 1)
        dxa, db = torch.autograd.grad(y, (xa, unscaled), dy)
        return {"dxa": dxa, "db": db}

    return apply


def step(function, widths):
    def apply(dy, xa, b):
        before = [x.clone() for x in (dy, xa, b)]
        dxa, db = function(dy, xa, b, widths, SCALES[: len(widths)])
        assert all(map(torch.equal, before, (dy, xa, b))), "an input was written over"
        assert (dxa.dtype, db.dtype) == (dy.dtype, torch.float32)
        return {"dxa": dxa, "db": db}

    return apply


def make(rows, widths, rank, dtype, device):
    def draw(*sizes):
        return torch.randn(*sizes).to(device, dtype)

    return {"dy": draw(rows, sum(widths)), "xa": draw(rows, len(widths) * rank), "b": draw(sum(widths), rank)}


def check(compare_steps, tensors, widths):
    compare_steps(step(lora_grads, widths), step(reference, widths), truth(widths), tensors)


@pytest.mark.parametrize("rank", [16, pytest.param(32, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize("widths", [(1,), (7, 1, 3), (128, 64, 64), (131, 67), (600, 129, 513)], ids=str)
@pytest.mark.parametrize("rows", [1, 37])
def test_values(compare_steps, device, dtype, rows, widths, rank):
    check(compare_steps, make(rows, widths, rank, dtype, device), widths)


def test_more_rows_than_one_program(compare_steps, device, dtype):
    check(compare_steps, make(2053, (40, 24), 16, dtype, device), (40, 24))


def test_no_rows(compare_steps, device, dtype):
    check(compare_steps, make(0, (8, 5), 16, dtype, device), (8, 5))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 70),
    widths=st.lists(st.integers(1, 64), min_size=1, max_size=3),
    rank=st.sampled_from([16, 32]),
)
def test_any_small_shape(compare_steps, device, rows, widths, rank):
    check(compare_steps, make(rows, widths, rank, torch.float32, device), widths)


def test_rows_with_gaps(compare_steps, device, dtype):
    widths = (30, 21)
    tensors = make(41, widths, 16, dtype, device)
    tensors["dy"] = torch.randn(41, 70).to(device, dtype)[:, 3:54]
    tensors["xa"] = torch.randn(41, 50).to(device, dtype)[:, 5:37]
    check(compare_steps, tensors, widths)


def test_segments_do_not_mix(device, dtype):
    """A segment's gradients are those that it has alone."""
    widths = (50, 30, 20)
    t = make(45, widths, 16, dtype, device)
    dxa, db = lora_grads(**t, widths=widths, scales=SCALES)
    first = 0
    for index, width in enumerate(widths):
        columns, block = slice(first, first + width), slice(16 * index, 16 * index + 16)
        alone = lora_grads(t["dy"][:, columns], t["xa"][:, block], t["b"][columns], (width,), SCALES[index : index + 1])
        assert torch.equal(alone[0], dxa[:, block])
        assert torch.equal(alone[1], db[columns])
        first += width


@pytest.mark.parametrize("wide", ["dy", "xa"])
@pytest.mark.parametrize("stride", [2**30, 2**31])
def test_offsets_beyond_int32(huge, device, wide, stride):
    rows, widths = 2**31 // stride + 1, (20, 12)
    t = make(rows, widths, 16, torch.float16, device)
    t[wide] = huge((rows, 32), (stride, 1))
    far, near = (
        lora_grads(**tensors, widths=widths, scales=(1.0, 2.0)) for tensors in (t, t | {wide: t[wide].clone()})
    )
    assert all(map(torch.equal, far, near))


class _Product(torch.autograd.Function):
    """The twin's gradients as autograd's."""

    @staticmethod
    def forward(ctx, xa, b, widths):
        scaled = torch.cat([rows * scale for rows, scale in zip(b.split(widths), SCALES, strict=True)])
        ctx.save_for_backward(xa, scaled)
        ctx.widths = widths
        parts = zip(xa.chunk(len(widths), 1), scaled.split(widths), strict=True)
        return torch.cat([x @ rows.T for x, rows in parts], 1)

    @staticmethod
    def backward(ctx, dy):
        return *reference(dy, *ctx.saved_tensors, ctx.widths, SCALES), None


def test_twin_passes_gradcheck():
    xa, b = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((4, 6), (9, 2)))
    assert torch.autograd.gradcheck(lambda *t: _Product.apply(*t, (4, 2, 3)), (xa, b))


def test_refusals(device):
    t = make(3, (8, 8), 16, torch.float32, device)
    for widths in ((8, 7), (16,), (4, 4, 4, 4)):
        with pytest.raises(ValueError, match="do not fit"):
            lora_grads(**t, widths=widths, scales=SCALES)
    with pytest.raises(TypeError, match=r"xa is torch\.float64"):
        lora_grads(t["dy"], t["xa"].double(), t["b"], (8, 8), (1.0, 1.0))
