"""Every kernel on buffers of more than 2^31 elements, as a million tokens have: no offset is counted in 32 bits.

On a CPU the buffers are mappings whose pages exist once they are touched, and the interpreter runs the last programs of
a launch only: those of the last rows. An offset that wrapped around would read in front of its buffer, where there is
nothing but zeros. On a GPU the same tests run all programs on real memory.
"""

from __future__ import annotations

import builtins
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import (
    adamw_8bit,
    add_rms_norm,
    cross_entropy,
    decode_attention,
    draw,
    fp8_linear,
    geglu,
    layer_norm,
    lora_add,
    lora_glu,
    lora_grads,
    lora_rope,
    nf4_dequantize,
    norm_steps,
    rms_norm,
    rope,
    swiglu,
)
from ftcore_kernels.reference.adamw_8bit import Tensors
from ftcore_kernels.reference.adamw_8bit import Update as Step
from ftcore_kernels.reference.lora_rope import Heads, Update
from ftcore_kernels.reference.norm_steps import Norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu")
ROWS, WIDTH = 2**21 + 64, 1024
"""Together 2^31 + 2^16."""
LAST = 3
"""Rows that are not zero, and compared."""
PROGRAMS = 20
"""Of each axis of a launch that has more, the last so many are run."""
FAR = 2**31

Make = Callable[..., torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def poisoned_memory() -> None:
    """Instead of the one for all: to fill gigabytes with NaN would touch them."""


@pytest.fixture(autouse=True)
def last_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs the last programs only, adds up what these left, and copies no storage over itself."""
    if DEVICE.type == "cuda":
        return
    from triton.runtime import interpreter

    def last(*bounds: int) -> range:
        whole = builtins.range(*bounds)
        return whole if len(bounds) > 1 else whole[-PROGRAMS:]

    for module in (interpreter, lora_grads):
        monkeypatch.setattr(module, "range", last, raising=False)
    monkeypatch.setattr(lora_grads, "_WALKS", (128,))
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *given: None)


@pytest.fixture
def far() -> Make:
    """Make a contiguous tensor of zeros whose last rows are random."""

    def make(*shape: int, dtype: torch.dtype = torch.float16, fill: torch.Tensor | None = None) -> torch.Tensor:
        number, size = torch.Size(shape).numel(), torch.empty((), dtype=dtype).element_size()
        if DEVICE.type == "cuda":
            if torch.cuda.mem_get_info()[0] < 4 * number * size:
                pytest.skip(f"needs {4 * number * size / 2**30:.0f} GiB of GPU memory")
            whole = torch.zeros(number, dtype=dtype, device=DEVICE)
        else:
            map_noreserve = 0x4000
            pages = mmap.mmap(-1, (FAR + number) * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | map_noreserve)
            whole = torch.frombuffer(pages, dtype=dtype)[FAR:]
        made = whole.view(shape)
        made[-LAST:] = torch.randn(LAST, *shape[1:]).to(dtype) if fill is None else fill
        return made

    return make


def assert_same(op: Callable[..., Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """What an operation leaves for the last rows, of all rows and of these alone; what is written over counts too."""
    near = {name: x[-LAST:].clone() for name, x in tensors.items()}
    results = []
    for given in (tensors, near):
        found = op(**given)
        found = [found] if isinstance(found, torch.Tensor) else [x for x in found if x is not None]
        results.append([x[-LAST:].clone() for x in (*found, *given.values())])
    assert results[0][0].any()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


@triton.jit
def _in_32_bits(x_ptr, out_ptr, rows, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    col = tl.arange(0, WIDTH)
    tl.store(out_ptr + row.to(tl.int64) * WIDTH + col, tl.load(x_ptr + row * WIDTH + col))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU has no zeros in front of a buffer")
def test_an_offset_in_32_bits_would_show(far) -> None:
    """Rows of zeros are read in place of the last ones."""

    def copied(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        _in_32_bits[(len(x),)](x, out, len(x), WIDTH=WIDTH)
        return out

    with pytest.raises(AssertionError):
        assert_same(copied, {"x": far(ROWS, WIDTH)})


WEIGHT = torch.linspace(0.5, 1.5, WIDTH).to(DEVICE)
NORM = Norm(WEIGHT, 1e-6)
ANGLES = torch.linspace(0.1, 0.9, 64).to(DEVICE)[None, None]
"""The same for every token, so that they are for the last rows of all and for these alone."""
B = torch.linspace(-1, 1, 2 * WIDTH * 16).to(DEVICE).half().view(2 * WIDTH, 16)


def with_backward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Outputs and gradients of an operation for the given upstream gradient of every output."""

    def both(dout: torch.Tensor, **inputs: torch.Tensor) -> list[torch.Tensor]:
        inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        found = function(**inputs)
        found = list(found) if isinstance(found, tuple) else [found]
        grads = torch.autograd.grad(found, list(inputs.values()), [dout] * len(found))
        return [*(x.detach() for x in found), *grads]

    return both


def _norm_steps(residual: Any, x: Any, dout: Any) -> Any:
    total, out, rstd = norm_steps.add_norm(residual, x, NORM)
    again, _ = norm_steps.norm(total, NORM)
    dx, _ = norm_steps.norm_backward(dout, total, rstd, NORM, residual, normed=True)
    return total, out, rstd, again, dx


def _glu(gate_up: Any, dout: Any, xa: Any) -> Any:
    update = Update(xa, torch.cat((B, B))[: 2 * WIDTH], (0, 1))
    out = lora_glu.lora_glu(gate_up, "silu", update)
    lora_glu.lora_glu_backward(dout, gate_up, "silu", update)
    return out


def _rope(qkv: Any, xa: Any) -> Any:
    heads, cos = Heads(2, 1, WIDTH // 4), ANGLES.expand(1, len(qkv), -1)
    out = lora_rope.lora_rope(qkv, cos, cos, heads, Update(xa, B[:WIDTH], (0, 1, 2)))
    parts = out.view(1, len(qkv), 4, WIDTH // 4).transpose(1, 2).split((2, 1, 1), 1)
    back, _, _ = lora_rope.lora_rope_backward(*parts, cos, cos, heads, out=torch.empty_like(qkv))
    return out, back


def _cross_entropy(logits: Any) -> Any:
    labels = torch.full((len(logits),), 7, device=DEVICE)
    form = cross_entropy.Form(-100, 0.0, 1.0, 0.0)
    loss, lse = (torch.zeros(len(logits), device=DEVICE) for _ in range(2))
    cross_entropy.losses(logits, labels, form, loss, lse)
    cross_entropy.gradients(logits, labels, form, lse, torch.ones_like(loss), None, logits)
    return loss, lse


def _draw(logits: Any, allowed: Any) -> Any:
    numbers = torch.full((len(logits),), 5, device=DEVICE)
    return draw.draw(logits, numbers, numbers, 1.0, allowed.view(torch.bool))


OPS: dict[str, tuple[Callable[..., Any], Sequence[str]]] = {
    "norm steps": (_norm_steps, ("residual", "x", "dout")),
    "rms_norm": (with_backward(lambda x: rms_norm.rms_norm(x, WEIGHT.half(), 1e-6)), ("x", "dout")),
    "add_rms_norm": (
        with_backward(lambda residual, x: add_rms_norm.add_rms_norm(residual, x, WEIGHT.half(), 1e-6)),
        ("residual", "x", "dout"),
    ),
    "layer_norm": (with_backward(lambda x: layer_norm.layer_norm(x, WEIGHT, WEIGHT, 1e-6)), ("x", "dout")),
    "swiglu": (with_backward(swiglu.swiglu), ("gate", "up", "dout")),
    "geglu": (with_backward(geglu.geglu), ("gate", "up", "dout")),
    "lora_add": (
        lambda residual, x, xa: lora_add.lora_add(residual, x, xa[:, :16], B[:WIDTH]),
        ("residual", "x", "xa"),
    ),
    "lora_glu": (_glu, ("gate_up", "dout", "xa")),
    "lora_rope": (_rope, ("qkv", "xa")),
    "lora_grads": (
        lambda dy, xa: lora_grads.lora_grads(dy, xa, B[:WIDTH], (512, 256, 256), (1.0, 2.0, 3.0))[0],
        ("dy", "xa"),
    ),
    "cross_entropy": (_cross_entropy, ("logits",)),
    "draw": (_draw, ("logits", "allowed")),
    "fp8 rows": (lambda x: [part.float() for part in _last(fp8_linear.quantize_rows(x))], ("x",)),
}


def _last(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x[-LAST:] for x in tensors]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "draw")) for name in OPS])
def test_rows_beyond_32_bits(name, far) -> None:
    op, inputs = OPS[name]
    special = {"xa": far(ROWS, 48), "gate_up": far(ROWS, 2 * WIDTH)}
    if "allowed" in inputs:
        special["allowed"] = far(ROWS, WIDTH, dtype=torch.uint8, fill=torch.arange(WIDTH, dtype=torch.uint8) % 2)
    assert_same(op, {each: special[each] if each in special else far(ROWS, WIDTH) for each in inputs})


@pytest.mark.parametrize("dim", ["batch", "token"])
def test_rope_beyond_32_bits(dim, far) -> None:
    """Its outputs; the strides of its inputs have a test of their own."""
    q = far(ROWS, 8, 128)
    q = q.view(1, ROWS, 8, 128) if dim == "token" else q.view(ROWS, 1, 8, 128)

    def turned(q: torch.Tensor) -> torch.Tensor:
        angles = ANGLES.expand(1, q.shape[1], -1)
        out = rope.rope(q.transpose(1, 2), q[:, :, :1].transpose(1, 2), angles, angles)[0]
        return out.transpose(1, 2).flatten(0, 1)[-LAST:].clone()

    near = q.flatten(0, 1)[-LAST:].clone()
    near = near[None] if dim == "token" else near[:, None]
    assert torch.equal(turned(q), turned(near))


def test_weights_beyond_32_bits(far) -> None:
    """Of a mapping, since 2^31 of them are more than the interpreter would unpack."""
    number = FAR + 128
    packed = far(number // 2, dtype=torch.uint8, fill=torch.tensor([17, 130, 255], dtype=torch.uint8))
    absmax = far(number // 64, dtype=torch.float32, fill=torch.tensor([2.0, 3.0, 4.0]))
    out = nf4_dequantize.nf4_dequantize(packed, absmax, (number,), dtype=torch.float16)[-128:]
    tail = nf4_dequantize.nf4_dequantize(packed[-64:].clone(), absmax[-2:].clone(), (128,), dtype=torch.float16)
    assert torch.equal(out, tail)
    assert len(out[-6:].unique()) > 3


def test_a_cache_beyond_32_bits(far) -> None:
    """The last of three rows of a cache of 2^30 numbers each."""
    length, dim = 2**26, 16
    cache = [far(3 * length * dim).view(3, 1, length, dim) for _ in range(2)]
    for each in cache:
        each[2, 0, -64:] = torch.randn(64, dim).half()
    new = torch.randn(3, 3, 1, 1, dim).half().to(DEVICE)
    scores = decode_attention.Scores(scale=0.3, window=32)
    positions = torch.tensor([3, 5, length - 1], device=DEVICE)
    found = decode_attention.decode_attention(*new, *cache, positions, scores)
    small = [each[2:, :, -64:].clone() for each in cache]
    at = torch.tensor([63], device=DEVICE)
    alone = decode_attention.decode_attention(*(x[2:] for x in new), *small, at, scores)
    torch.testing.assert_close(found[2:], alone, rtol=1e-3, atol=1e-3)
    assert torch.equal(cache[0][2, 0, -1], new[1, 2, 0, 0]), "the new key is in its place"


def test_a_parameter_beyond_32_bits(far) -> None:
    number = FAR + 2**20

    def step(size: int, make: Make) -> torch.Tensor:
        torch.manual_seed(0)
        param, grad = make(size), make(size)
        moments = [make(size, dtype=torch.uint8, fill=torch.tensor(0, dtype=torch.uint8)) for _ in range(2)]
        scales = [make(size // 256, dtype=torch.float32, fill=torch.tensor(0.0)) for _ in range(2)]
        adamw_8bit.adamw_8bit([Tensors(param, grad, *moments, *scales)], Step(step=1, lr=0.1))
        return param[-LAST:].clone()

    def near(*shape: int, dtype: torch.dtype = torch.float16, fill: torch.Tensor | None = None) -> torch.Tensor:
        made = torch.zeros(shape, dtype=dtype, device=DEVICE)
        made[-LAST:] = torch.randn(LAST).to(dtype) if fill is None else fill
        return made

    assert torch.equal(step(number, far), step(4096, near))
