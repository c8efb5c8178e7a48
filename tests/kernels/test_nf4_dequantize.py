"""NF4: bitwise equal to NumPy and to bitsandbytes, for every byte, odd sizes and doubly quantized scales."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from ftcore_kernels.ops import nf4_dequantize as module
from ftcore_kernels.ops.nf4_dequantize import nf4_dequantize
from ftcore_kernels.reference.nf4_dequantize import NF4, AbsmaxState
from ftcore_kernels.reference.nf4_dequantize import nf4_dequantize as reference


def decode(packed, absmax, shape, blocksize, dtype, absmax_state=None):
    """One weight at a time, from the description of the format."""
    packed, scales = packed.cpu().numpy().ravel(), absmax.cpu().numpy().ravel()
    if absmax_state is not None:
        code, absmax2, offset = (x.cpu().numpy().ravel() for x in absmax_state[:3])
        scales = [code[c] * absmax2[i // absmax_state.blocksize2] + offset[0] for i, c in enumerate(scales)]
    out = np.empty(int(np.prod(shape)), np.float32)
    for i in range(out.size):
        half = packed[i // 2] & 15 if i % 2 else packed[i // 2] >> 4
        out[i] = np.float32(NF4[half]) * np.float32(scales[i // blocksize])
    return torch.from_numpy(out).to(dtype).view(shape)


def make(shape, device, blocksize=64, double=False, blocksize2=256):
    number = int(np.prod(shape))
    blocks = -(-number // blocksize)
    packed = torch.randint(256, ((number + 1) // 2, 1), dtype=torch.uint8).to(device)
    if not double:
        return packed, torch.rand(blocks).add(0.01).to(device), None
    state = AbsmaxState(
        torch.randn(256).to(device),
        torch.rand(-(-blocks // blocksize2)).to(device),
        torch.rand(()).to(device),
        blocksize2,
    )
    return packed, torch.randint(256, (blocks,), dtype=torch.uint8).to(device), state


def check(packed, absmax, state, shape, blocksize, dtype):
    before = packed.clone(), absmax.clone()
    expected = decode(packed, absmax, shape, blocksize, dtype, state)
    for function in (nf4_dequantize, nf4_dequantize, reference):
        out = function(packed, absmax, shape, blocksize, dtype, state)
        assert (out.dtype, tuple(out.shape)) == (dtype, tuple(shape))
        assert out.is_contiguous()
        assert torch.equal(out.cpu(), expected)
    assert torch.equal(packed, before[0])
    assert torch.equal(absmax, before[1])


@pytest.mark.parametrize("double", [False, True], ids=["fp32 scales", "double"])
@pytest.mark.parametrize("shape", [(1,), (2,), (63,), (65,), (7, 131), (3, 5, 33), (4, 64), (0,), (3, 0)])
def test_bitwise(device, dtype, shape, double):
    packed, absmax, state = make(shape, device, double=double)
    check(packed, absmax, state, shape, 64, dtype)


@pytest.mark.parametrize("blocksize", [2, 32, 128, 4096])
def test_other_block_sizes(device, dtype, blocksize):
    packed, absmax, state = make((5, 101), device, blocksize, double=True, blocksize2=4)
    check(packed, absmax, state, (5, 101), blocksize, dtype)


def test_every_byte(device, dtype):
    packed = torch.arange(256, dtype=torch.uint8).to(device)
    for scale in (0.0, 1.0, 0.017, 60000.0):
        absmax = torch.full((8,), scale, device=device)
        check(packed, absmax, None, (512,), 64, dtype)


def test_several_programs(device, dtype, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 32)
    packed, absmax, state = make((9, 37), device, double=True, blocksize2=2)
    check(packed, absmax, state, (9, 37), 64, dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(number=st.integers(0, 300), log_blocksize=st.integers(1, 7), double=st.booleans())
def test_any_small_shape(device, number, log_blocksize, double):
    packed, absmax, state = make((number,), device, 2**log_blocksize, double, 4)
    check(packed, absmax, state, (number,), 2**log_blocksize, torch.float32)


@pytest.mark.parametrize("double", [False, True], ids=["fp32 scales", "double"])
@pytest.mark.parametrize("shape", [(8, 64), (33, 70), (7, 31), (300, 66)])
def test_parity_with_bitsandbytes(device, dtype, shape, double):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.compiler.set_stance("force_eager")  # it compiles its own fallbacks
    weight = torch.randn(shape).to(device, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    torch.compiler.set_stance("default")
    nested = None
    if double:
        nested = AbsmaxState(state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
    for function in (nf4_dequantize, reference):
        ours = function(packed, state.absmax, state.shape, state.blocksize, state.dtype, nested)
        assert torch.equal(ours, theirs)


def test_transposed_use(device):
    packed, absmax, _ = make((6, 40), device)
    x = torch.randn(3, 6).to(device)
    weight = decode(packed, absmax, (6, 40), 64, torch.float32).to(device)
    torch.testing.assert_close(x @ nf4_dequantize(packed, absmax, (6, 40), dtype=torch.float32), x @ weight)


@pytest.mark.parametrize("double", [False, True], ids=["fp32 scales", "double"])
def test_into_rows_of_a_larger_buffer(device, dtype, double):
    """Several weights under each other, as one product wants them; the rows around them stay."""
    whole = torch.full((20, 40), 7.0, dtype=dtype, device=device)
    parts = [make(shape, device, double=double) for shape in ((6, 40), (3, 40))]
    for function in (nf4_dequantize, reference):
        whole.fill_(7.0)
        for (packed, absmax, state), rows in zip(parts, (slice(2, 8), slice(8, 11)), strict=True):
            shape = (rows.stop - rows.start, 40)
            before = packed.clone(), absmax.clone()
            out = function(packed, absmax, shape, 64, dtype, state, out=whole[rows])
            assert out.data_ptr() == whole[rows].data_ptr()
            assert torch.equal(out.cpu(), decode(packed, absmax, shape, 64, dtype, state))
            assert torch.equal(out, function(packed, absmax, shape, 64, dtype, state))
            assert torch.equal(packed, before[0])
            assert torch.equal(absmax, before[1])
        assert (whole[:2] == 7).all()
        assert (whole[11:] == 7).all()


def test_refuses_memory_that_does_not_fit(device, dtype):
    packed, absmax, _ = make((6, 40), device)
    other = torch.float16 if dtype == torch.float32 else torch.float32
    for function in (nf4_dequantize, reference):
        for out in (
            torch.empty(40, 6, dtype=dtype, device=device),
            torch.empty(6, 40, dtype=other, device=device),
            torch.empty(40, 6, dtype=dtype, device=device).T,
        ):
            with pytest.raises(ValueError, match=r"out is .*; it must be contiguous \(6, 40\)"):
                function(packed, absmax, (6, 40), dtype=dtype, out=out)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter would take hours for 2^31 weights")
def test_offsets_beyond_int32(device):
    number = 2**31 + 70
    if torch.cuda.mem_get_info()[0] < 6 * number:
        pytest.skip(f"needs {6 * number / 2**30:.0f} GiB of GPU memory")
    packed = torch.randint(256, (number // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(-(-number // 64), device=device)
    out = nf4_dequantize(packed, absmax, (number,), dtype=torch.float16)
    tail = 64 * 10 + 6
    assert torch.equal(out[-tail:].cpu(), decode(packed[-tail // 2 :], absmax[-11:], (tail,), 64, torch.float16))


def test_refusals(device):
    packed, absmax, state = make((10, 64), device, double=True)
    for function in (nf4_dequantize, reference):
        with pytest.raises(TypeError, match=r"absmax is torch\.uint8"):
            function(packed, absmax, (10, 64))
        with pytest.raises(TypeError, match=r"absmax is torch\.float32"):
            function(packed, absmax.float(), (10, 64), absmax_state=state)
        with pytest.raises(TypeError, match=r"packed is torch\.bfloat16"):
            function(packed.view(-1).view(torch.bfloat16), absmax, (10, 64), absmax_state=state)
        with pytest.raises(TypeError, match=r"dtype is torch\.float64"):
            function(packed, absmax, (10, 64), 64, torch.float64, state)
        with pytest.raises(ValueError, match="321 packed bytes"):
            function(packed, absmax, (641,), absmax_state=state)
        with pytest.raises(ValueError, match="power of two"):
            function(packed, absmax, (10, 64), 48, absmax_state=state)
        with pytest.raises(ValueError, match="256 codes"):
            function(packed, absmax, (10, 64), absmax_state=state._replace(code=state.code[:255]))
