"""The kernels of a decoding step against their plain twins, and those against float64 and the distribution."""

from __future__ import annotations

import math

import pytest
import torch

from ftcore.testing import maths
from ftcore_kernels.decoding import layers
from ftcore_kernels.reference import decode_attention as plain_attention
from ftcore_kernels.reference import draw as plain_draw
from ftcore_kernels.reference.decode_attention import Scores

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="Triton's interpreter gets bf16 products wrong")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=(pytest.mark.gpu, NO_GPU))]

SHAPES = {
    "grouped": (3, 4, 2, 300, 16, None, None),
    "one head of keys, odd width": (2, 6, 1, 70, 24, None, None),
    "in parts": (1, 4, 1, 700, 32, None, None),
    "window and cap": (2, 8, 4, 300, 64, 40, 5.0),
    "sinks": (3, 6, 2, 300, 16, None, None),
    "sinks in parts": (1, 4, 1, 700, 32, 600, None),
    "chunks": (3, 4, 2, 300, 16, None, None),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_its_twin_s(shape: str, dtype: torch.dtype) -> None:
    maths.needs_triton("triton")
    from ftcore_kernels.ops.decode_attention import decode_attention

    rows, heads, kv_heads, length, dim, window, cap = SHAPES[shape]
    drawn = torch.Generator().manual_seed(1)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=drawn).to(DEVICE, dtype)

    qkv = noise(rows, (heads + 2 * kv_heads) * dim).view(rows, 1, -1, dim).transpose(1, 2)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    cache = [noise(rows, kv_heads, length, dim) for _ in range(2)]
    positions = torch.tensor([0, length - 1, length // 2][-rows:], device=DEVICE)
    # What nobody wrote yet may be anything.
    for row, position in enumerate(positions.tolist()):
        for tensor in cache:
            tensor[row, :, position + 1 :] = torch.nan
    sinks = 2 * noise(heads) if shape.startswith("sinks") else None
    scores = Scores(dim**-0.5, window, cap, 90 if shape == "chunks" else None, sinks)
    wide = [tensor.double() for tensor in cache]
    expected = plain_attention.decode_attention(q.double(), k.double(), v.double(), *wide, positions, scores)
    twin = [tensor.clone() for tensor in cache]
    exact = plain_attention.decode_attention(q, k, v, *twin, positions, scores)
    found = decode_attention(q, k, v, *cache, positions, scores)
    for ours, theirs in zip(cache, twin, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    allowed = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert maths.apart(exact, expected) < allowed
    assert maths.apart(found, expected) < allowed


@pytest.mark.parametrize("width", [5, 259, 9000])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("masked", [False, True])
def test_draws_are_their_twin_s(width: int, temperature: float, masked: bool) -> None:
    maths.needs_triton("triton")
    from ftcore_kernels.ops.draw import draw

    drawn = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn((4, width), generator=drawn)).to(DEVICE)
    seeds = torch.randint(0, 2**32, (4,), generator=drawn).to(DEVICE)
    counts = torch.tensor([0, 1, 5, 99], device=DEVICE)
    allowed = (torch.rand((4, width), generator=drawn) < 0.5).to(DEVICE) if masked else None
    if allowed is not None:
        allowed[:, 0] = True
    tokens, logprobs = draw(logits, seeds, counts, temperature, allowed)
    expected, of_them = plain_draw.draw(logits, seeds, counts, temperature, allowed)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(logprobs, of_them, rtol=1e-5, atol=1e-5)
    if allowed is not None:
        assert allowed.gather(1, tokens[:, None]).all()


@pytest.mark.parametrize("what", ["seeds", "counts"])
def test_draws_are_from_the_softmax(what: str) -> None:
    """Chi-square over 100 thousand draws, of many seeds or of many tokens of one row."""
    chances, number = torch.tensor([0.05, 0.15, 0.3, 0.5]), 100_000
    many, one = torch.arange(number), torch.full((number,), 7)
    seeds, counts = (many, one) if what == "seeds" else (one, many)
    logits = (2.0 * chances.log()).expand(number, 4)
    tokens, logprobs = plain_draw.draw(logits, seeds, counts, temperature=2.0)
    found = torch.bincount(tokens, minlength=4)
    chi_square = float(((found - number * chances) ** 2 / (number * chances)).sum())
    assert chi_square < 16.3, "one in a thousand with 3 degrees of freedom"
    torch.testing.assert_close(logprobs, chances.log()[tokens], rtol=1e-5, atol=1e-5)


def test_noise_is_gumbel_s() -> None:
    noise = plain_draw.gumbel(torch.arange(5000), torch.zeros(5000, dtype=torch.int64), 100)
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    neighbours = torch.corrcoef(torch.stack((noise[:-1].flatten(), noise[1:].flatten())))[0, 1]
    assert abs(float(neighbours)) < 0.01


def test_the_plain_twins_are_for_cpus() -> None:
    assert layers.op("draw", torch.device("cpu")) is plain_draw.draw
