"""FP8 products: rows bitwise as the twin rounds them, products against fp64 of the same fp8 operands, gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.layers.fp8_linear import Fp8Linear
from ftcore_kernels.ops import fp8_linear as module
from ftcore_kernels.ops.fp8_linear import fp8_mm, fp8_mm_t, quantize_rows, quantize_weight
from ftcore_kernels.reference import fp8_linear as reference
from ftcore_kernels.reference.fp8_linear import E4M3, dequantize

FAST = 3e-2
HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= module.FP8
# fp8 tensor cores keep about 14 bits of a sum before it is promoted to fp32.
ACCUMULATED = 1e-3 if HAS_FP8 else 1e-5
# Roundings of a result to the dtype of x: the twin's products are in fp32. Where the GPU has no fp8 product the result
# is rounded before and after its scales, and a backward in 16 bits rounds the weights and the result.
TWIN, OURS = 1, 2
ON_FP8 = [pytest.mark.gpu, pytest.mark.skipif(not HAS_FP8, reason="needs fp8 tensor cores")]

SHAPES = [
    *[(1, 16, 16), (5, 48, 64), (33, 32, 112), (5, 7, 9), (0, 16, 32)],
    *[
        pytest.param(shape, marks=ON_FP8)
        # Few rows of large K is what cuBLAS has no kernel for; then the layers of Llama-3.1-8B, and widths of a 70B.
        for shape in [
            *[(1, 4096, 14336), (127, 3072, 9216), (256, 3072, 9216), (257, 3072, 9216), (272, 4096, 14336)],
            *[(1000, 6144, 4096), (2048, 4096, 4096), (2048, 28672, 4096), (2048, 4096, 14336), (300, 512, 28672)],
        ]
    ],
]
"""M, N, K."""


@torch.no_grad()
def row_errors(actual, truth):
    """The relative error in norm of every row: a row of outliers must not hide the others."""
    actual = actual.to(truth.device).double()
    return (actual - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(1e-30)


def off(actual, truth):
    """That of the worst row."""
    return max(row_errors(actual, truth).tolist(), default=0.0)


def assert_rounded(actual, truth, roundings):
    """Nothing but so many roundings and the sum of the product keeps `actual` from fp64 of the same fp8 operands."""
    eps = torch.finfo(actual.dtype).eps
    errors = row_errors(actual, truth)
    # A rounding moves a value by half a unit in the last place at most, which is eps / 2 of it; in a short row, or one
    # of an outlier times the few mantissas of e4m3, they need not average out.
    assert (errors <= roundings * eps / 2 + ACCUMULATED).all(), errors.max()
    if actual.numel() >= 1000:
        # All in all they do: an error is as likely here as there in its unit, and does not know of the other ones.
        unit = truth.sign() * torch.ldexp(torch.full_like(truth, eps / 2), truth.frexp().exponent)
        expected = (roundings / 12 * row_errors(truth + unit, truth).square() + ACCUMULATED**2).mean().sqrt()
        assert errors.square().mean().sqrt() <= 1.15 * expected


def product(q_x, scale_x, q, scale):
    """In fp64: what is left is accumulation and rounding of the result."""
    return (q_x.double() * scale_x.double()[:, None]) @ (q.double() * scale.double()[:, None]).t()


def bits(x):
    return x.cpu().view(torch.uint8)


def rows(m, k, device, dtype):
    """Rows of different size, with outliers; one row is zero. Products in fp16 have room for them."""
    x = torch.randn(m, k) * torch.randn(m, 1).exp() * 0.05
    x[1::3, :1] *= 1e4
    x[2::5] = 0
    return x.clamp(-3e3, 3e3).to(device, dtype)


def weight(n, k, device, dtype):
    return quantize_weight((torch.randn(n, k) * k**-0.5 * torch.randn(n, 1).div(2).exp()).to(device, dtype))


def check_rows(x, columns=None):
    before = x.clone()
    theirs = reference.quantize_rows(x.cpu(), None if columns is None else columns.cpu())
    for q, scale in (quantize_rows(x, columns), quantize_rows(x, columns), reference.quantize_rows(x, columns)):
        assert (q.dtype, scale.dtype, q.shape, scale.shape) == (E4M3, torch.float32, x.shape, x.shape[:1])
        assert q.is_contiguous()
        assert torch.equal(bits(q), bits(theirs[0]))
        assert torch.equal(scale.cpu(), theirs[1])
    assert torch.equal(x, before)
    wide = x.cpu().double() if columns is None else (x.cpu().float() * columns.cpu()).double()
    q, scale = (t.double() for t in theirs)
    # Half a unit in the last of 3 bits of mantissa, or half of the smallest e4m3 number, 2^-9.
    assert ((q * scale[:, None] - wide).abs() <= (wide.abs() * 2**-4 + scale[:, None] * 2**-10) * (1 + 1e-5)).all()
    if x.numel():
        largest = wide.abs().amax(1)
        assert (scale[largest == 0] == 1).all()
        assert (q.abs().amax(1)[largest > 0] == 448).all()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled columns"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (31, 100), (33, 64), (6, 4097), (3, 28672), (3, 32768), (0, 5)])
def test_rows_are_bitwise_those_of_the_twin(device, dtype, shape, scaled):
    x = rows(*shape, device, dtype)
    check_rows(x, torch.randn(shape[1]).exp().to(device) if scaled else None)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(m=st.integers(1, 6), k=st.integers(1, 70), exponent=st.integers(-30, 30))
def test_any_small_shape_and_size(device, m, k, exponent):
    check_rows((torch.randn(m, k) * 2.0**exponent).to(device))


def codes():
    """Every finite e4m3 number, every middle between two, and what lies just beside those."""
    values = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    infinity = torch.tensor(float("inf"))
    return torch.cat([values, middles, middles.nextafter(infinity), middles.nextafter(-infinity)])[None]


@pytest.mark.parametrize("convert", [False, pytest.param(True, marks=ON_FP8)], ids=["integers", "conversion"])
def test_every_code_and_every_tie(device, monkeypatch, convert):
    """With the conversion of new GPUs, and with the integer arithmetic of old ones and of the interpreter."""
    monkeypatch.setattr(module, "_converts", lambda device: convert)
    x = codes().to(device)
    check_rows(x)
    check_rows(x / 1024)
    check_rows(x.repeat(40, 3) * torch.randn(40, 1, device=device))
    q, scale = quantize_rows(x)
    finite = x[0].to(E4M3).float() == x[0]
    assert scale.item() == 1
    assert torch.equal(q[0].float()[finite], x[0][finite])


def test_tiny_and_subnormal_rows_stay_finite(device):
    x = torch.tensor([[1e-45, -1e-40, 0], [1e-38, 3e-38, -1e-37], [1e-30, 0, 1e-31], [3e38, -1e38, 1e30]])
    q, scale = quantize_rows(x.to(device))
    assert torch.equal(bits(q), bits(reference.quantize_rows(x)[0]))
    assert scale.isfinite().all()
    assert q.float().isfinite().all()
    assert (scale > 0).all()


def test_what_is_not_finite_stays_so_and_in_its_row(device):
    x = torch.randn(4, 40)
    x[1, 3], x[2, 5], x[2, 6] = float("nan"), float("inf"), -float("inf")
    q, scale = quantize_weight(torch.randn(16, 40).to(device))
    for function in (fp8_mm, reference.fp8_mm):
        out = function(x.to(device), q, scale)
        assert out[[0, 3]].isfinite().all()
        assert not out[[1, 2]].isfinite().any()


def test_views_are_read_in_place(device, dtype):
    x = rows(9, 130, device, dtype)
    for view in (x[:, 1:], x[::2], x[:, 3:-1], x.t(), x[:, ::2], x[2:3].expand(4, -1), x[:, :1]):
        check_rows(view)


def test_offsets_beyond_int32(device, huge):
    check_rows(huge((3, 40), (2**30, 1)))


def test_rows_of_padding(device):
    x = rows(5, 70, device, torch.float32)
    q, scale = module._quantize(x, None, 16)
    assert torch.equal(bits(q[:5]), bits(quantize_rows(x)[0]))
    assert not bits(q[5:]).any()
    assert (scale[5:] == 1).all()


def test_wider_than_a_program(device):
    x = torch.randn(2, 32769).to(device)
    check_rows(x)
    assert module._quantize(x, None, 16)[0].shape == (16, 32769)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(device, dtype, shape):
    m, n, k = shape
    x, (q, scale) = rows(m, k, device, dtype), weight(n, k, device, dtype)
    truth = product(*quantize_rows(x), q, scale)
    for function in (fp8_mm, reference.fp8_mm):
        out = function(x, q, scale)
        assert (out.dtype, out.shape) == (dtype, (m, n))
        assert out.is_contiguous()
        assert out.isfinite().all()
        assert_rounded(out, truth, TWIN if function is reference.fp8_mm else OURS)
        assert torch.equal(out, function(x, q, scale)), "two runs differ"
        target = torch.empty_like(out)
        assert function(x, q, scale, out=target) is target
        assert torch.equal(target, out)
    assert off(fp8_mm(x, q, scale, use_fast_accum=True), truth) <= FAST
    if dtype == torch.float32 and device.type == "cpu" and m:
        assert off(fp8_mm(x, q, scale), truth) <= 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_product(device, dtype, shape):
    m, n, k = shape
    dy, (q, scale) = rows(m, n, device, dtype), weight(n, k, device, dtype)
    q_t = q.t().contiguous()
    fp8_truth = product(*quantize_rows(dy, scale), q_t, torch.ones(k, device=device))
    truth = dy.double() @ (q.double() * scale.double()[:, None])
    for function in (fp8_mm_t, reference.fp8_mm_t):
        fp8, exact = function(dy, q_t, q, scale), function(dy, None, q, scale)
        for out in (fp8, exact):
            assert (out.dtype, out.shape) == (dtype, (m, k))
            assert out.isfinite().all()
        roundings = TWIN if function is reference.fp8_mm_t else OURS
        assert_rounded(fp8, fp8_truth, roundings)
        assert_rounded(exact, truth, roundings)


@pytest.mark.parametrize("shape", [(272, 256, 512), (7, 256, 512), (1, 4096, 14336)], ids=str)
@pytest.mark.gpu
@pytest.mark.skipif(not HAS_FP8, reason="needs fp8 tensor cores")
def test_fp8_tensor_cores_are_used(device, monkeypatch, shape):
    m, n, k = shape
    x, (q, scale) = rows(m, k, device, torch.bfloat16), weight(n, k, device, torch.bfloat16)

    def unpacked(*args):
        raise AssertionError("the weights were unpacked")

    monkeypatch.setattr(module, "_unpacked_mm", unpacked)
    fp8_mm(x, q, scale)
    fp8_mm_t(x[:, :n].contiguous(), q.t().contiguous(), q, scale)


def pretend_scaled_mm(monkeypatch, error=None):
    """A GPU with fp8 products, as far as `_product` can see; `error` is what they raise."""

    def scaled_mm(q_x, scale_x, q, scale, dtype, use_fast_accum, out):
        if error:
            raise RuntimeError(error)
        assert q_x.shape[0] % 16 == 0
        assert q_x.shape[0] > 256
        result = module._unpacked_mm(q_x, scale_x, q, scale, dtype)
        return result if out is None else out.copy_(result)

    monkeypatch.setattr(module, "_has_fp8_product", lambda x, q: True)
    monkeypatch.setattr(module, "_scaled_mm", scaled_mm)


@pytest.mark.parametrize("error", [None, "CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLt"], ids=["kernel", "none"])
@pytest.mark.parametrize("m", [5, *(pytest.param(m, marks=pytest.mark.slow) for m in (272, 289))])
def test_padding_and_shapes_that_cublas_has_no_kernel_for(device, dtype, monkeypatch, m, error):
    pretend_scaled_mm(monkeypatch, error)
    x, (q, scale) = rows(m, 64, device, dtype), weight(32, 64, device, dtype)
    truth = product(*quantize_rows(x), q, scale)
    assert_rounded(fp8_mm(x, q, scale), truth, OURS)
    wide = torch.empty(m, 40, device=device, dtype=dtype)
    for target in (torch.empty(m, 32, device=device, dtype=dtype), wide[:, :32]):
        assert fp8_mm(x, q, scale, out=target) is target
        assert_rounded(target, truth, OURS)
    assert wide[:, 32:].isnan().all()


def test_other_errors_are_not_hidden(device, monkeypatch):
    pretend_scaled_mm(monkeypatch, "out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        fp8_mm(rows(5, 64, device, torch.float32), *weight(32, 64, device, torch.float32))


def test_small_gradients_in_fp16_do_not_vanish(device):
    """They are multiplied by the scales of the weights, which fp16 could not hold."""
    dy, (q, scale) = torch.randn(5, 64).mul(1e-4).half().to(device), weight(64, 80, device, torch.float32)
    scale = scale * 0.1
    dx = fp8_mm_t(dy, q.t().contiguous(), q, scale)
    assert off(dx, dy.double() @ (q.double() * scale.double()[:, None])) < 0.05


def test_close_to_the_product_that_it_approximates(device, dtype):
    x, w = torch.randn(64, 256).to(device, dtype), torch.randn(96, 256).to(device, dtype)
    q, scale = quantize_weight(w)
    assert 0.01 < off(fp8_mm(x, q, scale), x.double() @ w.double().t()) < 0.06
    dy = torch.randn(64, 96).to(device, dtype)
    for q_t, bound in ((q.t().contiguous(), 0.06), (None, 0.04)):
        assert 0.01 < off(fp8_mm_t(dy, q_t, q, scale), dy.double() @ w.double()) < bound


def test_an_outlier_costs_its_own_row_only(device, dtype):
    x, (q, scale) = torch.randn(6, 64).to(device, dtype), weight(32, 64, device, dtype)
    hit = x.clone()
    hit[2, 7] = 1e4
    others = [0, 1, 3, 4, 5]
    assert torch.equal(fp8_mm(hit, q, scale)[others], fp8_mm(x, q, scale)[others])


def test_refusals(device):
    x, (q, scale) = torch.randn(3, 32).to(device), weight(16, 32, device, torch.float32)
    for ops in (module, reference):
        with pytest.raises(ValueError, match="expected a matrix"):
            ops.quantize_rows(x[0])
        with pytest.raises(ValueError, match=r"scale_columns must be \[32\] float32"):
            ops.quantize_rows(x, torch.ones(31, device=device))
        with pytest.raises(ValueError, match="cannot be multiplied"):
            ops.fp8_mm(x[:, :31], q, scale)
        with pytest.raises(ValueError, match="cannot be multiplied"):
            ops.fp8_mm_t(x, None, q, scale)
        with pytest.raises(TypeError, match="contiguous float8_e4m3fn"):
            ops.fp8_mm(x, q.float(), scale)
        with pytest.raises(ValueError, match=r"scale must be \[16\] float32"):
            ops.fp8_mm(x, q, scale.half())
        with pytest.raises(ValueError, match="with contiguous rows"):
            ops.fp8_mm_t(x[:, :16], q.t(), q, scale)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        quantize_rows(x.double())


# ---------------------------------------------------------------------------------------------------------------------
# The layer.
# ---------------------------------------------------------------------------------------------------------------------


def make_layer(device, dtype, transposed, bias=True):
    linear = torch.nn.Linear(64, 48, bias=bias).to(device, dtype)
    return linear, Fp8Linear(linear, transposed)


@pytest.mark.parametrize("transposed", [True, False], ids=["fp8 backward", "16-bit backward"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layer(device, dtype, transposed, bias):
    linear, layer = make_layer(device, dtype, transposed, bias)
    x = torch.randn(2, 5, 64).to(device, dtype).requires_grad_()
    # A view with odd strides and an offset, as attention hands them back.
    dout = torch.randn(2, 48, 7).to(device, dtype).transpose(1, 2)[:, 1:-1]
    out = layer(x)
    out.backward(dout)
    q_x, scale_x = quantize_rows(x.detach().view(10, 64))
    truth = product(q_x, scale_x, layer.weight, layer.scale) + (layer.bias.double() if bias else 0)
    assert (out.dtype, out.shape) == (dtype, (2, 5, 48))
    assert_rounded(out.detach().view(10, 48), truth, OURS + bias)
    dy = dout.reshape(10, 48)
    if transposed:
        dx = product(*quantize_rows(dy, layer.scale), layer.weight.t(), torch.ones(64, device=device))
    else:
        dx = dy.double() @ layer.dequantize().double()
    assert (x.grad.dtype, x.grad.shape) == (dtype, x.shape)
    assert_rounded(x.grad.view(10, 64), dx, OURS)
    assert off(x.grad.view(10, 64), dy.double() @ linear.weight.double()) < 0.06
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())
    assert (layer.weight_t is not None) == transposed


def test_layer_takes_empty_batches_and_recomputation(device):
    _, layer = make_layer(device, torch.float32, True)
    assert layer(torch.zeros(0, 3, 64, device=device)).shape == (0, 3, 48)
    x = torch.randn(3, 64, device=device, requires_grad=True)
    layer(x).sum().backward()
    direct, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, direct)


def test_layer_stays_in_fp8(device):
    _, layer = make_layer(device, torch.float32, True)
    x = torch.randn(3, 64, device=device)
    before, scale = layer(x), layer.scale.clone()
    for change in (torch.nn.Module.half, torch.nn.Module.float, torch.nn.Module.bfloat16, copy.deepcopy):
        changed = change(layer)
        assert isinstance(changed, Fp8Linear)
        assert (changed.weight.dtype, changed.weight_t.dtype) == (E4M3, E4M3)
        assert torch.equal(changed.scale, scale)
    assert layer.compute_dtype == layer.bias.dtype == torch.bfloat16
    torch.testing.assert_close(layer.float()(x), before, rtol=0, atol=1e-2)  # the bias was rounded to bf16


def test_layer_in_autocast(device):
    _, layer = make_layer(device, torch.float32, True)
    x = torch.randn(3, 64, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.1, atol=0.1)


def test_layer_is_saved_without_its_copy(device):
    _, layer = make_layer(device, torch.float32, True)
    _, other = make_layer(device, torch.float32, True)
    state = layer.state_dict()
    assert set(state) == {"weight", "scale", "bias"}
    other.load_state_dict(state)
    x = torch.randn(3, 64, device=device)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(bits(other.weight_t), bits(layer.weight_t))


def test_dequantized_weights_are_those_of_the_product(device):
    linear, layer = make_layer(device, torch.float32, False)
    assert torch.equal(layer.dequantize(), layer.weight.float() * layer.scale[:, None])
    assert torch.equal(dequantize(layer.weight, layer.scale), layer.dequantize())
    assert off(layer.dequantize(), linear.weight.detach().double()) < 0.04
