"""The gated activation between the products of an MLP, with the low-rank updates of both sides of it.

The forward reads the fused gate-and-up buffer once, adds LoRA's part in registers and writes the activation: the
buffer itself stays as the product left it. The backward reads it again with the gradient of the activation, adds
LoRA's part to both, and overwrites them: the buffer with its gradient, the activation's gradient with the activation,
which the gradients of the down projection need.

These are plain steps of a manual backward, not differentiable functions: `ftcore_kernels.layers.decoder` puts them
together.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops.geglu import _distribution
from ftcore_kernels.reference.lora_glu import ACTIVATIONS, Activation
from ftcore_kernels.reference.lora_rope import Update

# Few rows at a time, for registers, but many one after the other, for the factors of the update.
_TOKENS, _COLUMNS, _STEPS = 16, 128, 8
_WIDE = 110_000
"""Bytes of shared memory that these take with factors of 32 bits and a rank above 32: A100 and H100 have them."""


def lora_glu(gate_up: torch.Tensor, activation: Activation = "silu", update: Update | None = None) -> torch.Tensor:
    """Return `activation(gate) * up`, rounded once.

    :param gate_up: `[M, 2 I]` with contiguous rows: the gate's columns, then the other's. Not written to.
    :param activation: `"silu"`, `"gelu_tanh"` or `"gelu"`.
    :param update: LoRA's part of both projections, or None.
    :returns: `[M, I]`.
    """
    _check(gate_up, activation)
    out = gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))
    if out.numel():
        grid, arguments, constants = _arguments(gate_up, activation, update)
        with torch.cuda.device_of(gate_up):
            _lora_glu_kernel[grid](gate_up, out, *arguments, **constants, num_warps=2, num_stages=stages(update))
    return out


def lora_glu_backward(
    dout: torch.Tensor,
    gate_up: torch.Tensor,
    activation: Activation = "silu",
    update: Update | None = None,
    dxa: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
) -> None:
    """Overwrite `gate_up` with its gradient and `dout` with the activation.

    :param dout: `[M, I]` contiguous: the gradient of the activation, through the down projection's frozen weight.
    :param gate_up: `[M, 2 I]` with contiguous rows, what the forward was given.
    :param update: What the forward was given.
    :param dxa: `[M, R]`: the gradient of the down projection's `x A^T`, or None without LoRA there.
    :param a: `[R, I]`: its A.
    """
    _check(gate_up, activation)
    _launch.check(dout=dout, gate_up=gate_up)
    if dout.numel():
        grid, arguments, constants = _arguments(gate_up, activation, update)
        down = (dout, 0, dout) if dxa is None or a is None else (dxa, dxa.stride(0), a)
        with torch.cuda.device_of(gate_up):
            _lora_glu_back_kernel[grid](
                dout,
                gate_up,
                *down,
                *arguments,
                **constants,
                DOWN_RANK=0 if a is None else a.shape[0],
                num_warps=4,
                num_stages=stages(update),
            )


def _check(gate_up: torch.Tensor, activation: str) -> None:
    _launch.check(gate_up=gate_up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")


def stages(update: Update | None) -> int:
    """Depth of the loads in flight: high ranks fill the 64 KiB of shared memory that the smallest GPUs have."""
    return 3 if update is None or update.b.shape[1] <= 16 else 1


def columns(update: Update | None, device: torch.device) -> int:
    """Columns of a program: fewer where a high rank would not fit the shared memory."""
    if update is None or update.b.shape[1] <= 16:
        return _COLUMNS
    wide = update.b.element_size() == 4 and update.b.shape[1] > 32
    return _COLUMNS // 4 if _launch.shared_memory(device) < (_WIDE if wide else _launch.SMALL) else _COLUMNS


def _arguments(gate_up, activation, update):
    """The launch grid and what both kernels take."""
    width_of_program = columns(update, gate_up.device)
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    xa, b, blocks = (gate_up, gate_up, (0, 0)) if update is None else update
    constants = {
        "RANK": 0 if update is None else b.shape[1], "GATE_RANKS": blocks[0], "UP_RANKS": blocks[1],
        "ACTIVATION": activation, "TOKENS": _TOKENS, "COLUMNS": width_of_program, "STEPS": _STEPS,
    }  # fmt: skip
    grid = (triton.cdiv(tokens, _TOKENS * _STEPS) * triton.cdiv(width, width_of_program),)
    return grid, (gate_up.stride(0), xa, xa.stride(0), b, tokens, width), constants


@triton.jit
def _lora_glu_kernel(
    gate_up_ptr, out_ptr, gate_up_stride, xa_ptr, xa_stride, b_ptr, tokens, width,
    RANK: tl.constexpr, GATE_RANKS: tl.constexpr, UP_RANKS: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """One program per STEPS blocks [TOKENS, COLUMNS] of the activation, one under the other."""
    first, column = place(width, TOKENS * STEPS, COLUMNS)
    gate_b, up_b = _factors(b_ptr, column, width, RANK)
    for step in range(STEPS):
        token = first + step * TOKENS + tl.arange(0, TOKENS)[:, None]
        mask = (token < tokens) & (column < width)
        gate_at = token * gate_up_stride + column
        gate, up = _load(gate_up_ptr, gate_at, width, xa_ptr + token * xa_stride, gate_b, up_b, token < tokens, mask,
                         RANK, GATE_RANKS, UP_RANKS)  # fmt: skip
        activated, _ = _activate(gate, ACTIVATION)
        tl.store(out_ptr + token * width + column, activated * up, mask=mask)


@triton.jit
def _lora_glu_back_kernel(
    dout_ptr, gate_up_ptr, dxa_ptr, dxa_stride, a_ptr, gate_up_stride, xa_ptr, xa_stride, b_ptr, tokens, width,
    RANK: tl.constexpr, GATE_RANKS: tl.constexpr, UP_RANKS: tl.constexpr, ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, DOWN_RANK: tl.constexpr,
):  # fmt: skip
    """As the forward: dout * up * f'(gate) and dout * f(gate) over gate and up, f(gate) * up over dout."""
    first, column = place(width, TOKENS * STEPS, COLUMNS)
    gate_b, up_b = _factors(b_ptr, column, width, RANK)
    a = 0.0
    if DOWN_RANK:
        rank = tl.arange(0, DOWN_RANK)
        a = tl.load(a_ptr + rank[:, None].to(tl.int64) * width + column, mask=column < width, other=0.0)
    for step in range(STEPS):
        token = first + step * TOKENS + tl.arange(0, TOKENS)[:, None]
        mask = (token < tokens) & (column < width)
        gate_at, out_at = token * gate_up_stride + column, token * width + column
        dout = tl.load(dout_ptr + out_at, mask=mask, other=0.0).to(tl.float32)
        if DOWN_RANK:
            rank = tl.arange(0, DOWN_RANK)
            dxa = tl.load(dxa_ptr + token * dxa_stride + rank[None, :], mask=token < tokens, other=0.0)
            dout += tl.dot(dxa, a, input_precision="ieee")
        gate, up = _load(gate_up_ptr, gate_at, width, xa_ptr + token * xa_stride, gate_b, up_b, token < tokens, mask,
                         RANK, GATE_RANKS, UP_RANKS)  # fmt: skip
        activated, slope = _activate(gate, ACTIVATION)
        tl.store(gate_up_ptr + gate_at, dout * up * slope, mask=mask)
        tl.store(gate_up_ptr + gate_at + width, dout * activated, mask=mask)
        tl.store(dout_ptr + out_at, activated * up, mask=mask)


@triton.jit
def place(width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's first row and its columns [1, COLUMNS], int64. Neighbours share rows."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(width, COLUMNS)
    return program // blocks * ROWS, (program % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def _factors(b_ptr, column, width, RANK: tl.constexpr):
    """The update's factors of this program's columns, [RANK, COLUMNS] each: loaded once for all its rows."""
    gate_b, up_b = 0.0, 0.0
    if RANK:
        at = column * RANK + tl.arange(0, RANK)[:, None]
        gate_b = tl.load(b_ptr + at, mask=column < width, other=0.0)
        up_b = tl.load(b_ptr + at + tl.cast(width, tl.int64) * RANK, mask=column < width, other=0.0)
    return gate_b, up_b


@triton.jit
def _load(
    gate_up_ptr, gate_at, width, xa_ptr, gate_b, up_b, rows, mask,
    RANK: tl.constexpr, GATE_RANKS: tl.constexpr, UP_RANKS: tl.constexpr,
):  # fmt: skip
    """Gate and up, fp32, the update added."""
    gate = tl.load(gate_up_ptr + gate_at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + width, mask=mask, other=0.0).to(tl.float32)
    if RANK:
        xa_ptr += tl.arange(0, RANK)[None, :]
        xa = tl.load(xa_ptr + GATE_RANKS * RANK, mask=rows, other=0.0)
        gate += tl.dot(xa, gate_b, input_precision="ieee")
        if UP_RANKS != GATE_RANKS:
            xa = tl.load(xa_ptr + UP_RANKS * RANK, mask=rows, other=0.0)
        up += tl.dot(xa, up_b, input_precision="ieee")
    return gate, up


@triton.jit
def _activate(gate, ACTIVATION: tl.constexpr):
    """The activation of the gate and its slope there."""
    if ACTIVATION == "silu":
        cdf = 1.0 / (1.0 + tl.exp(-gate))
        density = cdf * (1.0 - cdf)
    else:
        cdf, density = _distribution(gate, ACTIVATION == "gelu_tanh")
    return gate * cdf, cdf + gate * density
