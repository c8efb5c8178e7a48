"""AdamW with 8-bit moments in the format of bitsandbytes, in plain PyTorch (Dettmers et al. 2021, arXiv 2110.02861).

Every 256 elements of the flattened parameter share two fp32 scales, the largest magnitude of either moment; a moment is
its scale times an entry of a table of 256 numbers, signed for the first moment and unsigned for the second. Codes and
scales mean what they mean in bitsandbytes' `AdamW8bit`. What this update does otherwise than that of its GPU kernel:

* Weight decay comes before the step, as in PyTorch; there it shrinks the step too.
* A gradient that is not finite makes the 256 parameters of its block NaN, and so they stay; there it counts as zero.
* A quotient is rounded exactly; there it is approximate.
* A parameter of bf16 may be rounded by chance, up or down with odds such that its mean is what was to be written, so
  that steps below half of its last digit are not lost (Gupta et al. 2015, arXiv 1502.02551).
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from ftcore_kernels.reference._hash import GOLDEN, WORD, mix, spread

BLOCK = 256
"""Elements that share a scale."""
_SMALLEST, _LARGEST = 2.0**-126, 2.0**126  # scales with a normal reciprocal


class Tensors(NamedTuple):
    """One parameter and what its update reads and writes; contiguous, on one device."""

    param: torch.Tensor
    """fp16, bf16 or fp32, any shape; written."""
    grad: torch.Tensor
    """fp16, bf16 or fp32, in the shape of `param`."""
    m: torch.Tensor
    """First moment, in the shape of `param`: uint8 codes, or fp32 numbers where there are no scales; written."""
    v: torch.Tensor
    """Second moment, likewise; written."""
    absmax_m: torch.Tensor | None = None
    """`[ceil(n / 256)]` fp32, written; None keeps the moments in fp32."""
    absmax_v: torch.Tensor | None = None
    """Likewise."""


class Update(NamedTuple):
    """What AdamW needs to know; the properties are the numbers that a step calculates with, in double precision."""

    step: int
    """1 in the first step."""
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    rounding: int | None = None
    """Seed of bf16 parameters' rounding by chance, below 2^32; None rounds them to the nearest, of two even."""

    @property
    def keep(self) -> float:
        """What weight decay leaves of a parameter."""
        return 1.0 - self.lr * self.weight_decay

    @property
    def step_size(self) -> float:
        """The learning rate, with the bias of both moments corrected."""
        return self.lr * self._correction / (1 - self.betas[0] ** self.step)

    @property
    def noise(self) -> int:
        """What the rounding of this step begins from: the same number again when the same step is made again."""
        return mix((mix((self.rounding or 0) & WORD) + self.step * GOLDEN) & WORD)

    @property
    def corrected_eps(self) -> float:
        """`eps` beside a second moment whose bias is not corrected."""
        return self.eps * self._correction

    @property
    def _correction(self) -> float:
        return math.sqrt(1.0 - self.betas[1] ** self.step)


@torch.no_grad()
def adamw_8bit(
    tensors: Sequence[Tensors],
    update: Update,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """Make one step of AdamW, in place, in fp32 with one rounding of the parameter.

    :param tensors: Any number of parameters, in any mix of dtypes; the noise of a rounding depends on their order.
    :param update: The step's numbers.
    :param grad_scale: One fp32 number on the device that every gradient is multiplied by: the factor of a clipped norm.
    :param found_inf: One fp32 number on the device; nothing is written unless it is 0.
    """
    for number, each in enumerate(tensors):
        check(each)
        if found_inf is None or not found_inf:
            _update(each, number, update, grad_scale)


def _update(tensors: Tensors, number: int, update: Update, grad_scale: torch.Tensor | None) -> None:
    param, grad, m_out, v_out, absmax_m, absmax_v = tensors
    g = grad.reshape(-1).float()
    if grad_scale is not None:
        g = g * grad_scale
    p = param.reshape(-1).float()
    m = decode(m_out, absmax_m, signed=True) if absmax_m is not None else m_out.reshape(-1)
    v = decode(v_out, absmax_v, signed=False) if absmax_v is not None else v_out.reshape(-1)
    beta1, beta2 = update.betas
    # Products and sums apart: `add(alpha=)` rounds once on some processors.
    m = m * beta1 + g * (1 - beta1)
    v = v * beta2 + g * (1 - beta2) * g
    # In double precision and back, a square root is rounded exactly; that of fp32 is not on every processor.
    step = m / (v.double().sqrt().float() + update.corrected_eps) * update.step_size
    if absmax_m is not None and absmax_v is not None:
        scale_m, scale_v = _absmax(m), _absmax(v)
        lost = ~((scale_m < _LARGEST) & (scale_v < _LARGEST))
        for codes, scales, scale, moment, signed in (
            (m_out, absmax_m, scale_m, m, True),
            (v_out, absmax_v, scale_v, v, False),
        ):
            scale = scale.masked_fill(lost, math.nan)
            codes.copy_(encode(moment, scale, signed).view_as(codes))
            scales.copy_(scale.view_as(scales))
        step = step.masked_fill(_spread(lost, step.numel()), math.nan)
    else:
        m_out.copy_(m.view_as(m_out))
        v_out.copy_(v.view_as(v_out))
    p = p * update.keep - step
    if update.rounding is not None and param.dtype == torch.bfloat16:
        p = by_chance(p, mix((update.noise + number * GOLDEN) & WORD))
    param.copy_(p.view_as(param))


def by_chance(x: torch.Tensor, key: int) -> torch.Tensor:
    """Numbers `[n]` fp32 rounded to those that bf16 has: to either neighbour, the nearer the likelier.

    16 bits of noise are added below bf16's last bit, and what is left there is cut off.
    """
    keys = torch.tensor(key, device=x.device)
    noise = spread(keys, torch.arange(x.numel(), device=x.device)) >> 16
    bits = ((x.view(torch.int32) & WORD) + noise) & 0xFFFF0000
    bits = torch.where(bits > 0x7FFFFFFF, bits - (WORD + 1), bits)
    return torch.where(x.isnan(), x, bits.int().view(torch.float32))


def decode(codes: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """The moments that codes of any shape stand for, `[n]` fp32."""
    table = dynamic_map(signed).to(codes.device)
    return table[codes.reshape(-1).int()] * _spread(absmax.reshape(-1), codes.numel())


def encode(moment: torch.Tensor, absmax: torch.Tensor, signed: bool) -> torch.Tensor:
    """The codes next to a moment `[n]` fp32 with the scales `[ceil(n / 256)]` fp32, `[n]` uint8.

    The rule is that of bitsandbytes' GPU kernel (`quantize_2D` and what follows its call in
    `kOptimizerStatic8bit2StateBlockwise`, csrc/kernels.cu): the nearest entry, of two equally near ones the
    smaller, and a negative number gets a negative entry even if zero is nearer. Where it does otherwise: zeros keep the
    code of zero, whatever their sign, and so does a block of denormal numbers.
    """
    inverse = torch.where(absmax < _SMALLEST, 0.0, 1 / absmax)
    x = moment * _spread(inverse, moment.numel())
    codes = torch.bucketize(x, midpoints(signed).to(x.device))
    if signed:
        codes = torch.where(x < 0, codes.clamp(max=126), codes)
    return codes.masked_fill(x.isnan(), 254).to(torch.uint8)  # whose scale is NaN


def _absmax(moment: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of every block, `[blocks]`; NaN if there is one."""
    padded = torch.nn.functional.pad(moment, (0, -moment.numel() % BLOCK))
    return padded.view(-1, BLOCK).abs().amax(1)


def _spread(scales: torch.Tensor, number: int) -> torch.Tensor:
    return scales.repeat_interleave(BLOCK)[:number]


@cache
def dynamic_map(signed: bool) -> torch.Tensor:
    """The 256 numbers that codes stand for, `[256]` fp32, rising: bitsandbytes' `create_dynamic_map(signed)`.

    Seven decades below 1, the lowest with 1 number (2 if unsigned) and each with twice as many as the one below, in the
    middle of equal parts of [0.1, 1]; their negatives if signed; 0 and 1.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float32)
        magnitudes = (10 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)).tolist()
        numbers += magnitudes
        if signed:
            numbers += [-magnitude for magnitude in magnitudes]
    return torch.tensor(sorted(numbers), dtype=torch.float32)


@cache
def midpoints(signed: bool) -> torch.Tensor:
    """Where one code ends and the next begins, `[255]` fp32."""
    table = dynamic_map(signed)
    return (table[:-1] + table[1:]) * 0.5


def check(tensors: Tensors) -> None:
    """Refuse tensors that are not one parameter and its state: writing past the end of one would harm another."""
    param, grad, m, v, absmax_m, absmax_v = tensors
    number = param.numel()
    floats = (torch.float16, torch.bfloat16, torch.float32)
    if param.dtype not in floats or grad.dtype not in floats:
        raise TypeError(f"param is {param.dtype} and grad {grad.dtype}; they must be float16, bfloat16 or float32")
    if (absmax_m is None) != (absmax_v is None):
        raise TypeError("give both absmax_m and absmax_v, or neither")
    state = torch.float32 if absmax_m is None else torch.uint8
    scales = [absmax for absmax in (absmax_m, absmax_v) if absmax is not None]
    if {m.dtype, v.dtype} != {state} or any(absmax.dtype != torch.float32 for absmax in scales):
        raise TypeError(f"m is {m.dtype} and v {v.dtype}; they must be {state}, and scales float32")
    blocks = -(-number // BLOCK)
    if {grad.numel(), m.numel(), v.numel()} != {number} or any(absmax.numel() != blocks for absmax in scales):
        raise ValueError(f"a parameter of {number} elements needs a gradient and moments of as many, {blocks} scales")
    for tensor in (param, grad, m, v, *scales):
        if not tensor.is_contiguous() or tensor.device != param.device:
            raise ValueError(f"all tensors must be contiguous and on one device, {param.device}")
