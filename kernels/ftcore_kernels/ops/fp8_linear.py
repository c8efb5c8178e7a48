"""Products with weights in float8_e4m3fn, one fp32 scale per output channel. An approximation.

Rows are quantized by one Triton kernel, a row per program. The product is `torch._scaled_mm` with a scale per row and
per column where the GPU has fp8 tensor cores; elsewhere both operands are dequantized for a plain matmul.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ftcore_kernels.ops import _launch
from ftcore_kernels.reference import fp8_linear as reference
from ftcore_kernels.reference.fp8_linear import E4M3, check_product, check_rows, check_transpose, dequantize

FP8 = (8, 9)
"""Compute capability from which there are fp8 tensor cores and a conversion to e4m3."""
_WIDEST = 32768
# cuBLAS has no row-scaled fp8 product for some shapes of up to 256 rows (pytorch/ao#4582): small ones are padded.
_LEAST_ROWS = 272


def quantize_rows(x: torch.Tensor, scale_columns: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round every row to e4m3, its largest value to 448.

    :param x: `[M, K]`, fp16, bf16 or fp32; rows of any stride are not copied.
    :param scale_columns: `[K]` fp32: column k is multiplied by it first, in fp32.
    :returns: `[M, K]` float8_e4m3fn, contiguous, and `[M]` fp32 scales; the scale of an all-zero row is 1. A row with
        an infinity or NaN in it stands for values that are not finite.
    """
    return _quantize(x, scale_columns, x.shape[0])


def quantize_weight(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight `[N, K]` to e4m3 `[N, K]` and fp32 scales `[N]`, one per output channel."""
    return quantize_rows(w)


def fp8_mm(
    x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    use_fast_accum: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return `quantize_rows(x) @ (q * scale)^T`.

    :param x: `[M, K]`, fp16, bf16 or fp32.
    :param q: `[N, K]` float8_e4m3fn, contiguous.
    :param scale: `[N]` fp32.
    :param use_fast_accum: Leave sums in the accumulators of the tensor cores, about 14 bits; False promotes them to
        fp32 on the way.
    :param out: `[M, N]` in the dtype of x, to write to.
    :returns: `[M, N]` in the dtype of x. No gradients.
    """
    check_product(x, q, scale)
    return _product(x, None, q, scale, use_fast_accum, out)


def fp8_mm_t(
    dy: torch.Tensor, q_t: torch.Tensor | None, q: torch.Tensor, scale: torch.Tensor, use_fast_accum: bool = False
) -> torch.Tensor:
    """Return `dy @ (q * scale)`: the gradient of `fp8_mm` with respect to x, straight through x's quantization.

    :param dy: `[M, N]`, fp16, bf16 or fp32.
    :param q_t: `[K, N]`, the transpose of q, contiguous: dy, times scale, is quantized as well. None multiplies in the
        dtype of dy, without that approximation.
    :param q: `[N, K]` float8_e4m3fn.
    :param scale: `[N]` fp32.
    :param use_fast_accum: As in `fp8_mm`; gradients are better off without.
    :returns: `[M, K]` in the dtype of dy.
    """
    check_product(dy, q, scale, transposed=True)
    if q_t is None:
        return dy @ dequantize(q, scale, dy.dtype)
    check_transpose(q_t, q)
    # The weight's scales belong to the summed dimension here, so they go into dy: both passes use the same fp8 values.
    return _product(dy, scale, q_t, scale.new_ones(q_t.shape[0]), use_fast_accum, None)


def _product(
    x: torch.Tensor,
    scale_columns: torch.Tensor | None,
    q: torch.Tensor,
    scale: torch.Tensor,
    use_fast_accum: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`quantize_rows(x, scale_columns) [M, K] @ (q * scale)^T [K, N]`."""
    number = x.shape[0]
    if not number or not _has_fp8_product(x, q):
        result = _unpacked_mm(*_quantize(x, scale_columns, number), q, scale, x.dtype)
        return result if out is None else out.copy_(result)
    padded = max(-(-number // 16) * 16, _LEAST_ROWS)
    q_x, scale_x = _quantize(x, scale_columns, padded)
    target = out if padded == number and out is not None and out.is_contiguous() else None
    try:
        result = _scaled_mm(q_x, scale_x, q, scale, x.dtype, use_fast_accum, target)[:number]
        if target is not None:
            return target
    except RuntimeError as error:  # shapes and GPUs that cuBLAS has no kernel for: only it knows which
        if "CUBLAS_STATUS_NOT_SUPPORTED" not in str(error):
            raise
        result = _unpacked_mm(q_x[:number], scale_x[:number], q, scale, x.dtype)
    return result if out is None else out.copy_(result)


def _scaled_mm(
    q_x: torch.Tensor,
    scale_x: torch.Tensor,
    q: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    use_fast_accum: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """`[M, K]` and `[N, K]` in e4m3 with fp32 scales `[M]` and `[N]` -> `[M, N]`."""
    options: dict[str, Any] = {"out_dtype": dtype, "use_fast_accum": use_fast_accum}
    if out is not None:
        options["out"] = out
    return torch._scaled_mm(q_x, q.t(), scale_a=scale_x[:, None], scale_b=scale[None, :], **options)


def _unpacked_mm(
    q_x: torch.Tensor, scale_x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`_scaled_mm` in `dtype`. Scales come last: in fp16, gradients times the scales of weights would vanish."""
    # Every e4m3 value is a multiple of 2^-9, so this is exact in fp16 too, and leaves room for a sum of thousands.
    product = q_x.to(dtype).mul_(2.0**-15) @ q.to(dtype).t()
    return (product.float() * (scale_x[:, None] * 2.0**15)).mul_(scale).to(dtype)


def _has_fp8_product(x: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether `_scaled_mm` takes these: sizes in 16s; fp32 results exist in cuBLAS on Hopper only."""
    if x.device.type != "cuda" or any(size % 16 or not size for size in q.shape):
        return False
    capability = torch.cuda.get_device_capability(x.device)
    return capability >= FP8 and (x.dtype != torch.float32 or capability[0] == 9)


def _quantize(x: torch.Tensor, scale_columns: torch.Tensor | None, padded: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_rows` with rows of zeros added up to `padded`."""
    check_rows(x, scale_columns)
    _launch.check(x=x, **({} if scale_columns is None else {"scale_columns": scale_columns}))
    width = x.shape[1]
    if width > _WIDEST:  # the row of one program would not fit its registers
        return reference.quantize_rows(F.pad(x, (0, 0, 0, padded - x.shape[0])), scale_columns)
    x = _launch.last_contiguous(x)
    q = torch.empty(padded, width, dtype=torch.uint8, device=x.device)
    scale = torch.empty(padded, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(max(width, 1))
    if padded:
        with torch.cuda.device_of(x):
            _quantize_kernel[(padded,)](
                x, x.stride(0), x if scale_columns is None else scale_columns.contiguous(), q, scale, x.shape[0], width,
                COLUMNS=scale_columns is not None, CONVERT=_converts(x.device), BLOCK=block,
                num_warps=_launch.warps(block), enable_fp_fusion=False,  # the sum in _e4m3 needs a rounded product
            )  # fmt: skip
    return q.view(E4M3), scale


def _converts(device: torch.device) -> bool:
    """Whether there is a conversion to e4m3. Triton's interpreter has one, but loses the carry into the exponent."""
    return device.type == "cuda" and not _launch.INTERPRETED and torch.cuda.get_device_capability(device) >= FP8


@triton.jit
def _quantize_kernel(
    x_ptr, x_stride, columns_ptr, q_ptr, scale_ptr, rows, width,
    COLUMNS: tl.constexpr, CONVERT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row, also of padding: x [rows, width] -> q [programs, width] contiguous, scale [programs]."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK)
    filled = tl.where(row < rows, width, 0)
    x = tl.load(x_ptr + row * x_stride + col, mask=col < filled, other=0.0).to(tl.float32)
    if COLUMNS:
        x = x * tl.load(columns_ptr + col, mask=col < width, other=0.0)
    amax = tl.max(tl.abs(x), axis=0)
    amax = tl.where(amax > 0.0, tl.maximum(amax, 7.888609052210118e-31), 448.0)  # 2^-100
    # Divisions by / are not correctly rounded on a GPU.
    tl.store(scale_ptr + row, tl.div_rn(amax, 448.0))
    x = x * tl.div_rn(448.0, amax)
    q = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True) if CONVERT else _e4m3(x)
    tl.store(q_ptr + row * width + col, q, mask=col < width)


@triton.jit
def _e4m3(x):
    """The bits of fp32 x, at most 448 in size or NaN, in e4m3: to nearest, ties to even."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Three bits of mantissa stay, the carry goes into the exponent, whose bias falls from 127 to 7.
    code = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 there are multiples of 2^-9 only: what fp32 keeps of a sum with 2^14.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, code)
    code = tl.where(size > 0x7F800000, 0x7F, tl.minimum(code, 0x7E))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
