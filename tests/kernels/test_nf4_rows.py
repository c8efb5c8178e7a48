"""Products with packed NF4 weights: those of the dequantized weights, whose every number is bitwise the same."""

import pytest
import torch

pytest.importorskip("triton")

from ftcore_kernels.ops import _few_rows
from ftcore_kernels.ops.nf4_rows import Config, nf4_rows
from ftcore_kernels.reference.nf4_dequantize import AbsmaxState, nf4_dequantize
from ftcore_kernels.reference.nf4_rows import Packed, fits
from ftcore_kernels.reference.nf4_rows import nf4_rows as reference

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no warps")]
LOOKUPS = ["gather", pytest.param("shuffle", marks=ON_GPU)]


def pack(n, k, device, blocksize=64, nested=True):
    """Random bytes with scales of the size that weights have."""
    blocks = n * k // blocksize
    packed = torch.randint(256, (n * k // 2, 1), dtype=torch.uint8).to(device)
    if not nested:
        return Packed(packed, (torch.rand(blocks) * 0.1 + 0.01).to(device), torch.Size((n, k)), blocksize)
    state = AbsmaxState(
        torch.linspace(-1, 1, 256).to(device),
        (torch.rand(-(-blocks // 256)) * 0.05).to(device),
        torch.tensor(0.07).to(device),
    )
    codes = torch.randint(256, (blocks,), dtype=torch.uint8).to(device)
    return Packed(packed, codes, torch.Size((n, k)), blocksize, state)


def unpack(weight, dtype):
    return nf4_dequantize(weight.packed, weight.absmax, weight.shape, weight.blocksize, dtype, weight.nested)


def assert_product(out, x, matrices):
    """Within the rounding of the result, and of fp32 sums."""
    w = torch.cat(matrices).double()
    truth, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    bound = truth.abs() * torch.finfo(x.dtype).eps + size * x.shape[1] ** 0.5 * 2**-22
    assert (out.dtype, out.shape) == (x.dtype, truth.shape)
    assert out.is_contiguous()
    assert ((out.double() - truth).abs() <= bound).all()


def check(x, weights, below=None, config=None):
    matrices = [unpack(weight, x.dtype) for weight in weights] + ([] if below is None else [below])
    out, twin = nf4_rows(x, weights, below, config), reference(x, weights, below)
    assert_product(out, x, matrices)
    assert_product(twin, x, matrices)
    assert torch.equal(out, nf4_rows(x, weights, below, config)), "two runs differ"


@pytest.mark.parametrize("nested", [True, False], ids=["double", "fp32 scales"])
@pytest.mark.parametrize("m", [1, 5, 16, 64])
def test_product(device, dtype, m, nested):
    """Rows and parts of K that fill no block: three weights as q, k and v, with LoRA's A below them."""
    weights = [pack(n, 320, device, nested=nested) for n in (70, 33, 1)]
    x, below = torch.randn(m, 320).to(device, dtype), torch.randn(48, 320).to(device, dtype)
    check(x, weights, below)
    check(x, weights[:2])


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("nested", [True, False], ids=["double", "fp32 scales"])
def test_every_number_is_that_of_the_dequantized_weight(device, dtype, nested, lookup):
    """Rows of the identity read the weights themselves: no sum hides a difference."""
    weight = pack(64, 256, device, nested=nested)
    weight.packed[:128, 0] = torch.arange(128)
    weight.packed[128:256, 0] = torch.arange(128, 256)
    expected = unpack(weight, dtype)
    for first in range(0, 256, 64):
        x = torch.eye(256, device=device, dtype=dtype)[first : first + 64]
        out = nf4_rows(x, [weight], None, Config(64, 128, 4, 1, 4, lookup))
        assert torch.equal(out, expected[:, first : first + 64].T)


CONFIGS = [(64, 128, 4, 1, 1), (64, 64, 4, 1, 8), (128, 256, 8, 1, 4), (64, 128, 4, 3, 4), (128, 128, 4, 2, 16)]


@pytest.mark.parametrize("lookup", LOOKUPS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_however_it_is_cut(device, dtype, config, lookup):
    weights = [pack(n, 640, device) for n in (130, 64)]
    x, below = torch.randn(7, 640).to(device, dtype), torch.randn(16, 640).to(device, dtype)
    check(x, weights, below, Config(*config, lookup))


@pytest.mark.parametrize("blocksize", [32, 128, 1024])
def test_other_block_sizes(device, dtype, blocksize):
    """Smaller and larger than a chunk of K."""
    check(torch.randn(3, 2048).to(device, dtype), [pack(5, 2048, device, blocksize)])


def test_more_than_64_rows_and_rows_with_a_stride(device, dtype):
    x = torch.randn(130, 300).to(device, dtype)[:, 5:261]
    check(x, [pack(66, 256, device)], torch.randn(16, 256).to(device, dtype))


def test_no_rows(device, dtype):
    x, weight = torch.randn(0, 64).to(device, dtype), pack(3, 64, device)
    assert nf4_rows(x, [weight]).shape == reference(x, [weight]).shape == (0, 3)


def test_parts_of_k_are_never_empty():
    for chunks in range(1, 40):
        for wanted in (1, 7, 100):
            parts = _few_rows.parts(3, chunks, wanted)
            assert 1 <= parts <= chunks
            assert (parts - 1) * -(-chunks // parts) < chunks


@pytest.mark.parametrize("nested", [True, False], ids=["double", "fp32 scales"])
def test_parity_with_bitsandbytes(device, dtype, nested):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.compiler.set_stance("force_eager")  # it compiles its own fallbacks
    weight = torch.randn(40, 192).to(device, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    torch.compiler.set_stance("default")
    scales = None
    if nested:
        scales = AbsmaxState(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    x = torch.randn(4, 192).to(device, dtype)
    assert_product(nf4_rows(x, [Packed(packed, state.absmax, state.shape, 64, scales)]), x, [theirs])


def test_refusals(device):
    x, weight = torch.randn(3, 128).to(device), pack(6, 128, device)
    for function in (nf4_rows, reference):
        with pytest.raises(ValueError, match=r"it must be \[M, 128\]"):
            function(x[:, :64], [weight])
        with pytest.raises(ValueError, match="weights must share K"):
            function(x, [weight, pack(6, 128, device, nested=False)])
        with pytest.raises(ValueError, match="weights must share K"):
            function(x, [])
        with pytest.raises(ValueError, match=r"below is .* it must be contiguous"):
            function(x, [weight], x.half())
        with pytest.raises(ValueError, match="packed bytes"):
            function(x, [weight._replace(packed=weight.packed[:-1])])
    with pytest.raises(ValueError, match="a launch takes up to 3"):
        nf4_rows(x, [weight] * 4)
    with pytest.raises(TypeError, match=r"is torch\.float64"):
        nf4_rows(x.double(), [weight])


def test_rows_that_do_not_end_with_a_block_do_not_fit(device):
    assert fits([pack(6, 128, device)])
    assert not fits([pack(4, 96, device)])
    assert not fits([pack(6, 128, device), pack(6, 128, device, blocksize=32)])
