"""Cross entropy of rows of logits: one pass forward, one pass backward, fp32 in between, any vocabulary.

The forward keeps a running maximum and a sum of exponentials relative to it, so it reads the logits once and saves one
number per row. The backward reads them once more and writes their gradient, by default to a tensor of its own.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops._launch import place, row_start

_BLOCK = 4096


class Form(NamedTuple):
    """Which loss: of `softcap * tanh(scale * logits / softcap) / temperature`, or uncapped where `softcap` is 0."""

    ignore_index: int
    softcap: float
    scale: float
    smoothing: float
    temperature: float = 1.0


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    softcap: float = 0.0,
    scale: float = 1.0,
    smoothing: float = 0.0,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's cross entropy and log-sum-exp; both have gradients (the second for a z-loss).

    :param logits: `[..., V]`, fp16, bf16 or fp32, any strides.
    :param labels: `[...]`, int64 or int32, in `[0, V)` or `ignore_index`: any other label makes its row NaN.
    :param ignore_index: Rows with this label have loss 0, log-sum-exp 0 and gradient 0, whatever their logits.
    :param softcap: Replace the scaled logits x by `softcap * tanh(x / softcap)`; 0 for no cap. Gemma 2 has 30.
    :param scale: Multiplies the logits, before the cap.
    :param smoothing: Label smoothing as in PyTorch: this share of the target is spread evenly over the vocabulary.
    :param inplace: Let the backward write the gradient over the logits, which are lost: only for logits that nothing
        else reads. A second backward through them is refused.
    :returns: Loss and log-sum-exp, fp32, in the shape of `labels`.
    """
    form = check_form(Form(ignore_index, softcap, scale, smoothing))
    _launch.check(logits=logits)
    check_labels(labels, logits.shape[:-1], logits.device)
    out: tuple[torch.Tensor, torch.Tensor] = _CrossEntropy.apply(logits, labels, form, inplace)
    return out


def check_form(form: Form) -> Form:
    """Return `form`, unless its numbers make no loss."""
    if form.softcap < 0:
        raise ValueError(f"softcap is {form.softcap}; it must be positive, or 0 for none")
    if not 0 <= form.smoothing <= 1:
        raise ValueError(f"smoothing is {form.smoothing}; it must be in [0, 1]")
    if form.temperature <= 0:
        raise ValueError(f"temperature is {form.temperature}; it must be positive")
    return form


def check_labels(labels: torch.Tensor, shape: torch.Size, device: torch.device) -> None:
    """Refuse labels that do not belong to rows of this shape."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels are {labels.dtype}; they must be int64 or int32")
    if labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the rows have shape {tuple(shape)}")
    if labels.device != device:
        raise ValueError(f"labels are on {labels.device}, the rows are on {device}")


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, inner, outer_stride, inner_stride, labels_ptr, loss_ptr, lse_ptr, top1_ptr, entropy_ptr,
    width, ignore_index, softcap, scale, smoothing, inverse_temperature,
    SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, METRICS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row: logits [rows, width], labels [rows] -> loss, lse, entropy [rows] fp32, top1 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row_start(row, inner, outer_stride, inner_stride)
    label = tl.load(labels_ptr + row).to(tl.int64)
    kept = label != ignore_index
    highest = tl.full((), float("-inf"), tl.float32)  # of the logits so far
    total = tl.zeros((), tl.float32)  # of exp(z - highest)
    moment = tl.zeros((), tl.float32)  # of exp(z - highest) * z
    plain = tl.zeros((), tl.float32)  # of z
    for first in range(0, tl.where(kept, width, 0), BLOCK):
        col = first + tl.arange(0, BLOCK)
        logits = tl.load(logits_ptr + col, mask=col < width, other=0.0)
        z, _ = _transformed(logits, softcap, scale, inverse_temperature, SOFTCAP)
        if SMOOTHING:
            plain += tl.sum(tl.where(col < width, z, 0.0), axis=0)
        z = tl.where(col < width, z, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # masked vocabularies have blocks of -inf only
        weight = tl.exp(z - base)
        decay = tl.exp(highest - base)
        total = total * decay + tl.sum(weight, axis=0)
        if METRICS:
            moment = moment * decay + tl.sum(weight * tl.where(weight > 0.0, z, 0.0), axis=0)
        highest = higher
    known = (label >= 0) & (label < width)
    logit = tl.load(logits_ptr + label, mask=known & kept, other=float("nan"))
    target, _ = _transformed(logit, softcap, scale, inverse_temperature, SOFTCAP)
    # Kept apart, (highest - target) loses no digits to a large common offset.
    spread = tl.log(tl.where(kept, total, 1.0))
    wanted = (1.0 - smoothing) * target + smoothing * (plain / width) if SMOOTHING else target
    tl.store(loss_ptr + row, tl.where(kept, spread + (highest - wanted), 0.0))
    tl.store(lse_ptr + row, tl.where(kept, highest + spread, 0.0))
    if METRICS:
        mean = moment / tl.where(kept, total, 1.0)
        tl.store(entropy_ptr + row, tl.where(kept, spread + (highest - mean), 0.0))
        tl.store(top1_ptr + row, (target >= highest) & kept)


@triton.jit
def _cross_entropy_back_kernel(
    logits_ptr, inner, outer_stride, inner_stride, dlogits_ptr, dlogits_inner, dlogits_outer_stride,
    dlogits_inner_stride, labels_ptr, lse_ptr, dloss_ptr, dloss_stride, dlse_ptr, dlse_stride,
    width, ignore_index, softcap, scale, smoothing, inverse_temperature,
    SOFTCAP: tl.constexpr, LSE_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK columns of a row. With z the transformed logits, p = exp(z - lse) and q the smoothed
    target: dlogits = (dloss * (p - q) + dlse * p) * dz / dlogits."""
    row, col = place(width, BLOCK)
    label = tl.load(labels_ptr + row).to(tl.int64)
    kept = label != ignore_index
    known = (label >= 0) & (label < width)
    lse = tl.load(lse_ptr + row)
    dloss = tl.where(known, tl.load(dloss_ptr + row * dloss_stride), float("nan"))
    start = row_start(row, inner, outer_stride, inner_stride)
    logits = tl.load(logits_ptr + start + col, mask=col < tl.where(kept, width, 0), other=0.0)
    z, slope = _transformed(logits, softcap, scale, inverse_temperature, SOFTCAP)
    p = tl.exp(z - lse)
    q = tl.where(col == label, 1.0 - smoothing, 0.0) + smoothing / width
    dz = dloss * (p - q)
    if LSE_GRAD:
        dz += tl.load(dlse_ptr + row * dlse_stride) * p
    start = row_start(row, dlogits_inner, dlogits_outer_stride, dlogits_inner_stride)
    tl.store(dlogits_ptr + start + col, tl.where(kept, dz * slope, 0.0), mask=col < width)


@triton.jit
def _transformed(logits, softcap, scale, inverse_temperature, SOFTCAP: tl.constexpr):
    """The logits scaled, capped and divided by the temperature, and the derivative of that; fp32."""
    z = logits.to(tl.float32) * scale
    slope = scale * inverse_temperature
    if SOFTCAP:
        capped = _tanh(z / softcap)
        z = softcap * capped
        slope *= 1.0 - capped * capped
    return z * inverse_temperature, slope


@triton.jit
def _tanh(x):
    """By exp, and by its series near zero, where 1 - exp(-2 |x|) would cancel."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    s = x * x
    near = x * (1.0 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, near, tl.where(x < 0.0, -far, far))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, form: Form, inplace: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, lse = (torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
        losses(logits, labels, form, loss, lse)
        # Not the lse returned, which is free to be changed.
        ctx.save_for_backward(logits, labels, lse.clone())
        ctx.set_materialize_grads(False)
        ctx.form, ctx.inplace = form, inplace
        return loss, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        logits, labels, lse = ctx.saved_tensors
        dlogits = logits if ctx.inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if dloss is None:
            dloss = lse.new_zeros(()).expand_as(lse)
        dlogits = gradients(logits, labels, ctx.form, lse, dloss, dlse, dlogits)
        if ctx.inplace:
            torch.autograd.graph.increment_version(logits)
        return dlogits, None, None, None


def losses(
    logits: torch.Tensor,
    labels: torch.Tensor,
    form: Form,
    loss: torch.Tensor,
    lse: torch.Tensor,
    top1: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
) -> None:
    """Write loss and log-sum-exp of every row, and unless they are None both metrics; all contiguous."""
    rows, width = _launch.as_rows(logits), logits.shape[-1]
    block = _block(width)
    if rows.number:
        with torch.cuda.device_of(logits):
            _cross_entropy_kernel[(rows.number,)](
                *rows, labels.contiguous(), loss, lse, loss if top1 is None else top1,
                loss if entropy is None else entropy, width, *_numbers(form), SOFTCAP=form.softcap != 0,
                SMOOTHING=form.smoothing != 0, METRICS=top1 is not None, BLOCK=block, num_warps=_launch.warps(block),
            )  # fmt: skip


def gradients(
    logits: torch.Tensor,
    labels: torch.Tensor,
    form: Form,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    dlse: torch.Tensor | None,
    dlogits: torch.Tensor,
) -> torch.Tensor:
    """Write the gradient of the logits to `dlogits`, which may be `logits`; return it (a copy, if strides need one)."""
    rows, width = _launch.as_rows(logits), logits.shape[-1]
    target = rows if dlogits is logits else _launch.as_rows(dlogits)
    block = _block(width)
    dloss = dloss.reshape(-1)
    dlse_rows = dloss if dlse is None else dlse.reshape(-1)  # not read where there is none
    if logits.numel():
        with torch.cuda.device_of(logits):
            _cross_entropy_back_kernel[(rows.number * triton.cdiv(width, block),)](
                *rows, *target, labels.contiguous(), lse, dloss, dloss.stride(0), dlse_rows, dlse_rows.stride(0),
                width, *_numbers(form), SOFTCAP=form.softcap != 0, LSE_GRAD=dlse is not None, BLOCK=block,
                num_warps=_launch.warps(block),
            )  # fmt: skip
    return target.tensor


def _numbers(form: Form) -> tuple[int, float, float, float, float]:
    """The numbers of a form as the kernels take them."""
    return (
        form.ignore_index, float(form.softcap), float(form.scale), float(form.smoothing), 1.0 / form.temperature
    )  # fmt: skip


def _block(width: int) -> int:
    """Columns that a program reads at a time."""
    return min(_BLOCK, int(triton.next_power_of_2(max(width, 1))))
