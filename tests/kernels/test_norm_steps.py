"""RMS normalisation as steps: values, gradients, and what is written over, against fp64 and the differentiable op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import norm_steps as steps
from ftcore_kernels.ops import rms_norm as tiles
from ftcore_kernels.ops.add_rms_norm import add_rms_norm
from ftcore_kernels.ops.rms_norm import rms_norm
from ftcore_kernels.reference import norm_steps as reference
from ftcore_kernels.reference.norm_steps import Norm

CONVENTIONS = {"llama": (0.0, False), "gemma": (1.0, True)}


def eps_of(x):
    # In a row of one or two elements the input gradient is a difference of near-equal numbers unless eps is large.
    return 1e-6 if x.shape[-1] > 2 else 1.0


def step(module, convention, weight_grad, after_addition):
    """Forward and backward by the steps of a module, every result by name."""
    offset, gemma = CONVENTIONS[convention]

    def apply(x, weight, dout, residual, residual_grad):
        norm = Norm(weight, eps_of(x), offset, gemma)
        total = x
        if after_addition:
            total, out, rstd = module.add_norm(residual, x, norm)
        else:
            out, rstd = module.norm(x, norm)
        out = out.clone()
        dx, dweight = module.norm_backward(dout, total, rstd, norm, residual_grad, normed=True, weight_grad=weight_grad)
        found = {"total": total, "out": out, "rstd": rstd, "dx": dx, "normed": dout}
        return found | ({"dweight": dweight} if weight_grad else {})

    return apply


def formula(convention, weight_grad, after_addition, dtype):
    offset, _ = CONVENTIONS[convention]

    def apply(x, weight, dout, residual, residual_grad):
        total = x + residual if after_addition else x
        total = total.to(dtype).double().requires_grad_()  # stored in between: the rest starts from the rounded sum
        weight.requires_grad_()
        rstd = (total.pow(2).mean(-1) + eps_of(x)).rsqrt()
        out = total * rstd[:, None] * (offset + weight)
        dx, dweight = torch.autograd.grad(out, (total, weight), dout)
        dx = dx if residual_grad is None else dx + residual_grad
        found = {"total": total, "out": out, "rstd": rstd, "dx": dx, "normed": out}
        return found | ({"dweight": dweight} if weight_grad else {})

    return apply


def make(rows, width, dtype, device, residual=True, weight_dtype=None):
    def draw(*shape):
        return torch.randn(*shape).to(device, dtype)

    return {
        "x": draw(rows, width),
        "weight": torch.randn(width).to(device, weight_dtype or dtype),
        "dout": draw(rows, width),
        "residual": draw(rows, width),
        "residual_grad": draw(rows, width) if residual else None,
    }


def check(compare_steps, tensors, convention="llama", weight_grad=True, after_addition=True):
    choice = convention, weight_grad, after_addition
    compare_steps(step(steps, *choice), step(reference, *choice), formula(*choice, tensors["x"].dtype), tensors)


@pytest.mark.parametrize("after_addition", [False, True], ids=["norm", "add_norm"])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (6, 127), (37, 128), (5, 1000), (0, 16)])
def test_values_and_gradients(compare_steps, device, dtype, shape, convention, after_addition):
    check(compare_steps, make(*shape, dtype, device), convention, after_addition=after_addition)


@pytest.mark.parametrize("weight_grad", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_frozen_weight_and_no_residual(compare_steps, device, dtype, weight_grad, residual):
    check(compare_steps, make(9, 40, dtype, device, residual), weight_grad=weight_grad)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_weight_of_another_dtype(compare_steps, device, dtype, convention):
    other = torch.float16 if dtype == torch.float32 else torch.float32
    check(compare_steps, make(7, 48, dtype, device, weight_dtype=other), convention)


def test_wide_rows(compare_steps, device, dtype):
    check(compare_steps, make(3, 4100, dtype, device))


def test_partial_sums_of_many_programs(compare_steps, device, dtype, monkeypatch):
    monkeypatch.setattr(tiles, "_TILE", 64)
    check(compare_steps, make(101, 32, dtype, device))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 64),
    convention=st.sampled_from(sorted(CONVENTIONS)),
    residual=st.booleans(),
    weight_grad=st.booleans(),
    after_addition=st.booleans(),
)
def test_any_small_shape(compare_steps, device, rows, width, convention, residual, weight_grad, after_addition):
    tensors = make(rows, width, torch.float32, device, residual)
    check(compare_steps, tensors, convention, weight_grad, after_addition)


@pytest.mark.parametrize("module", [steps, reference], ids=["triton", "reference"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("into", ["new", "residual_grad", "other"])
def test_what_is_written_over(device, dtype, module, normed, into):
    given = make(11, 40, dtype, device)
    norm = Norm(given["weight"], 1e-6)
    x, residual = given["x"].clone(), given["residual"].clone()
    total, out, rstd = module.add_norm(residual, x, norm)
    assert total.data_ptr() == x.data_ptr(), "the sum is not in the memory of x"
    assert torch.equal(total, given["x"] + given["residual"])
    assert torch.equal(residual, given["residual"])
    assert out.data_ptr() != total.data_ptr()
    alone, rstd_alone = module.norm(total, norm)
    assert torch.equal(alone, out)
    assert torch.equal(rstd_alone, rstd)
    assert torch.equal(total, given["x"] + given["residual"])

    plain, dweight = module.norm_backward(
        given["dout"].clone(), total, rstd, norm, given["residual_grad"], weight_grad=True
    )
    dout, residual_grad = given["dout"].clone(), given["residual_grad"].clone()
    memory = {"new": None, "residual_grad": residual_grad, "other": torch.empty_like(x)}[into]
    dx, _ = module.norm_backward(dout, total, rstd, norm, residual_grad, into=memory, normed=normed, weight_grad=True)
    assert memory is None or dx.data_ptr() == memory.data_ptr()
    assert torch.equal(dx, plain)
    assert dweight.dtype == torch.float32
    assert torch.equal(dout, out if normed else given["dout"])
    assert into == "residual_grad" or torch.equal(residual_grad, given["residual_grad"])
    assert torch.equal(total, given["x"] + given["residual"])
    assert torch.equal(given["weight"], norm.weight)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_equals_the_differentiable_op(device, dtype, convention):
    given = make(13, 96, dtype, device)
    offset, gemma = CONVENTIONS[convention]
    norm = Norm(given["weight"], 1e-6, offset, gemma)
    out, rstd = steps.norm(given["x"], norm)
    inputs = given["x"].clone().requires_grad_(), given["weight"].clone().requires_grad_()
    theirs = rms_norm(*inputs, 1e-6, offset, convention)
    assert torch.equal(out, theirs)
    dx, dweight = steps.norm_backward(given["dout"], given["x"], rstd, norm, weight_grad=True)
    their_dx, their_dweight = torch.autograd.grad(theirs, inputs, given["dout"])
    assert torch.equal(dx, their_dx)
    assert torch.equal(dweight.to(dtype), their_dweight)
    total, out, _ = steps.add_norm(given["residual"], given["x"].clone(), norm)
    assert all(map(torch.equal, (total, out), add_rms_norm(given["residual"], *inputs, 1e-6, offset, convention)))


class _Normed(torch.autograd.Function):
    """The twin's own backward as autograd's."""

    @staticmethod
    def forward(ctx, residual, x, weight, convention):
        norm = Norm(weight, 1e-2, *CONVENTIONS[convention])
        total, out, rstd = reference.add_norm(residual, x.clone(), norm)
        ctx.save_for_backward(total, rstd, weight)
        ctx.convention = convention
        return total, out

    @staticmethod
    def backward(ctx, dtotal, dout):
        total, rstd, weight = ctx.saved_tensors
        norm = Norm(weight, 1e-2, *CONVENTIONS[ctx.convention])
        dx, dweight = reference.norm_backward(dout, total, rstd, norm, dtotal, weight_grad=True)
        return dx, dx, dweight, None


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_twin_passes_gradcheck(convention):
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 5), (5,))]
    assert torch.autograd.gradcheck(lambda *t: _Normed.apply(*t, convention), tensors)


@pytest.mark.parametrize("module", [steps, reference])
def test_rows_with_gaps_between_them_are_refused(module, device) -> None:
    """A product beside a border has such rows; the kernels would read the border."""
    wide, norm = torch.randn(5, 96, device=device), Norm(torch.ones(64, device=device), 1e-6)
    gaps, whole = wide[:, :64], wide[:, :64].contiguous()
    with pytest.raises(ValueError, match="contiguous"):
        module.norm(gaps, norm)
    for residual, x in ((gaps, whole), (whole, gaps)):
        with pytest.raises(ValueError, match="contiguous"):
            module.add_norm(residual, x, norm)
