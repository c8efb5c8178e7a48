"""Products with weights in float8_e4m3fn, one fp32 scale per output channel, in plain PyTorch. An approximation.

A value stands for `q * scale`. Activations and gradients are quantized row by row just before a product, so a product
has two fp8 operands; nothing else about it is approximate (Micikevicius et al. 2022, arXiv 2209.05433).
"""

import torch

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""Largest finite e4m3 value."""
SMALLEST = 2.0**-100
"""Rows whose largest value is below are scaled as if it were this: `448 / amax` must not overflow."""


def quantize_rows(x: torch.Tensor, scale_columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row to e4m3, its largest value to 448.

    :param x: `[M, K]`, fp16, bf16 or fp32, any strides.
    :param scale_columns: `[K]` fp32: column k is multiplied by it first, in fp32.
    :returns: `[M, K]` float8_e4m3fn, contiguous, and `[M]` fp32 scales; the scale of an all-zero row is 1. A row with
        an infinity or NaN in it stands for values that are not finite.
    """
    check_rows(x, scale_columns)
    wide = x.float() if scale_columns is None else x.float() * scale_columns
    amax = wide.abs().amax(1) if x.numel() else wide.new_zeros(x.shape[0])
    largest = amax.new_full((), LARGEST)  # with numbers PyTorch would multiply by a reciprocal
    amax = torch.where(amax > 0, amax.clamp_min(SMALLEST), largest)
    return (wide * (largest / amax)[:, None]).to(E4M3).contiguous(), amax / largest


def quantize_weight(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight `[N, K]` to e4m3 `[N, K]` and fp32 scales `[N]`, one per output channel."""
    return quantize_rows(w)


def dequantize(q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return `q * scale`, `[N, K]` in `dtype`, rounded once.

    :param q: `[N, K]` float8_e4m3fn.
    :param scale: `[N]` fp32.
    """
    # Every e4m3 value is one of bf16 and fp16 too, and the product in place is computed in fp32.
    return q.to(dtype).mul_(scale[:, None])


def fp8_mm(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    use_fast_accum: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `quantize_rows(x) @ (q * scale)^T`, accumulated in fp32.

    :param x: `[M, K]`, fp16, bf16 or fp32, any strides.
    :param q: `[N, K]` float8_e4m3fn, contiguous.
    :param scale: `[N]` fp32.
    :param use_fast_accum: Not used here: the accumulators of tensor cores, without promotion to fp32 on the way.
    :param out: `[M, N]` in the dtype of x, to write to.
    :returns: `[M, N]` in the dtype of x. No gradients.
    """
    check_product(x, q, scale)
    q_x, scale_x = quantize_rows(x)
    result = (dequantize(q_x, scale_x) @ dequantize(q, scale).t()).to(x.dtype)
    return result if out is None else out.copy_(result)


def fp8_mm_t(
    dy: torch.Tensor, q_t: torch.Tensor | None, q: torch.Tensor, scale: torch.Tensor, use_fast_accum: bool = False
) -> torch.Tensor:
    """Return `dy @ (q * scale)`: the gradient of `fp8_mm` with respect to x, straight through x's quantization.

    :param dy: `[M, N]`, fp16, bf16 or fp32, any strides.
    :param q_t: `[K, N]`, the transpose of q, contiguous: dy, times scale, is quantized as well. None multiplies in the
        dtype of dy, without that approximation.
    :param q: `[N, K]` float8_e4m3fn.
    :param scale: `[N]` fp32.
    :param use_fast_accum: Not used here.
    :returns: `[M, K]` in the dtype of dy.
    """
    check_product(dy, q, scale, transposed=True)
    if q_t is None:
        return (dy.float() @ dequantize(q, scale)).to(dy.dtype)
    check_transpose(q_t, q)
    q_dy, scale_dy = quantize_rows(dy, scale)
    return (dequantize(q_dy, scale_dy) @ q_t.float().t()).to(dy.dtype)


def check_rows(x: torch.Tensor, scale_columns: torch.Tensor | None) -> None:
    """Refuse what has no rows, or other scales than one fp32 number per column."""
    if x.dim() != 2:
        raise ValueError(f"expected a matrix, got shape {tuple(x.shape)}")
    if scale_columns is not None and (scale_columns.shape != x.shape[1:] or scale_columns.dtype != torch.float32):
        raise ValueError(
            f"scale_columns must be [{x.shape[1]}] float32, got {tuple(scale_columns.shape)} {scale_columns.dtype}"
        )


def check_product(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, transposed: bool = False) -> None:
    """Refuse operands that do not fit, and weights that are not e4m3 with one fp32 scale per row."""
    if q.dim() != 2 or q.dtype != E4M3 or not q.is_contiguous():
        raise TypeError(f"q is {tuple(q.shape)} {q.dtype}; it must be a contiguous float8_e4m3fn matrix")
    if scale.shape != q.shape[:1] or scale.dtype != torch.float32:
        raise ValueError(f"scale must be [{q.shape[0]}] float32, got {tuple(scale.shape)} {scale.dtype}")
    if x.dim() != 2 or x.shape[1] != q.shape[0 if transposed else 1]:
        raise ValueError(f"shapes {tuple(x.shape)} and {tuple(q.shape)} cannot be multiplied")


def check_transpose(q_t: torch.Tensor, q: torch.Tensor) -> None:
    """Refuse a second copy of the weight that is not laid out as its transpose."""
    if q_t.shape != (q.shape[1], q.shape[0]) or q_t.dtype != E4M3 or q_t.stride(1) != 1:
        shape = (q.shape[1], q.shape[0])
        raise ValueError(f"q_t must be q's transpose {shape} with contiguous rows, got {tuple(q_t.shape)}")
