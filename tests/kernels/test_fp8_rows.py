"""Products of a few rows with float8 weights: those of the same quantized rows, summed in fp32."""

import pytest
import torch

pytest.importorskip("triton")

from ftcore_kernels.ops.fp8_linear import FP8
from ftcore_kernels.ops.fp8_rows import Config, fp8_rows
from ftcore_kernels.reference.fp8_linear import dequantize, quantize_rows, quantize_weight
from ftcore_kernels.reference.fp8_rows import fp8_rows as reference

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < FP8, reason="needs fp8 tensor cores"
)
PROMOTED = 2**-12
"""Relative to the sum of sizes: a GPU's accumulators have about 14 bits for 128 of K."""


def check(x, q, scale, below=None, config=None):
    q_x, scale_x = quantize_rows(x)
    rows, matrix = dequantize(q_x, scale_x).double(), dequantize(q, scale).double()
    truth, size = rows @ matrix.T, rows.abs() @ matrix.abs().T
    if below is not None:
        truth = torch.cat((truth, x.double() @ below.double().T), 1)
        size = torch.cat((size, x.double().abs() @ below.double().abs().T), 1)
    sums = PROMOTED if x.device.type == "cuda" else 2**-22
    for out in (fp8_rows(x, q, scale, below, config), reference(x, q, scale, below)):
        assert (out.dtype, out.shape) == (x.dtype, truth.shape)
        assert out.is_contiguous()
        assert ((out.double() - truth).abs() <= truth.abs() * torch.finfo(x.dtype).eps + size * sums).all()
    assert torch.equal(fp8_rows(x, q, scale, below, config), fp8_rows(x, q, scale, below, config)), "two runs differ"


def weight(n, k, device):
    return quantize_weight((torch.randn(n, k) * torch.randn(n, 1).div(2).exp()).to(device))


@pytest.mark.parametrize("m", [1, 16, pytest.param(70, marks=pytest.mark.slow)])
def test_product(device, dtype, m):
    """Rows and parts of K that fill no block, with LoRA's A below the weights."""
    q, scale = weight(40, 144, device)
    x, below = torch.randn(m, 144).to(device, dtype), torch.randn(48, 144).to(device, dtype)
    check(x, q, scale, below)
    check(x, q, scale)


@pytest.mark.parametrize("config", [(64, 64, 4, 2, 64), (128, 128, 8, 3, 4), (64, 256, 4, 2, 1)], ids=str)
def test_however_it_is_cut(device, dtype, config):
    q, scale = weight(70, 320, device)
    x = torch.randn(7, 400).to(device, dtype)[:, 9:329]
    check(x, q, scale, torch.randn(16, 320).to(device, dtype), Config(*config))


def test_no_rows(device, dtype):
    q, scale = weight(3, 64, device)
    x = torch.randn(0, 64).to(device, dtype)
    assert fp8_rows(x, q, scale).shape == reference(x, q, scale).shape == (0, 3)


def test_refusals(device):
    x, (q, scale) = torch.randn(3, 32).to(device), weight(16, 32, device)
    for function in (fp8_rows, reference):
        with pytest.raises(ValueError, match="cannot be multiplied"):
            function(x[:, :16], q, scale)
        with pytest.raises(ValueError, match="contiguous rows"):
            function(torch.randn(32, 3).to(device).T, q, scale)
        with pytest.raises(ValueError, match=r"below is .* it must be contiguous"):
            function(x, q, scale, x.half())
        with pytest.raises(TypeError, match="contiguous float8_e4m3fn"):
            function(x, q.float(), scale)
