"""The two gradients of a low-rank update that read the gradient of its product, in plain PyTorch."""

from collections.abc import Sequence

import torch

from ftcore_kernels.reference._precision import widen


def lora_grads(
    dy: torch.Tensor,
    xa: torch.Tensor,
    b: torch.Tensor,
    widths: Sequence[int],
    scales: Sequence[float],
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `xa` and of B, where `y = xa @ b.T` and `b = scale * B` per segment of columns.

    :param dy: `[M, N]`.
    :param xa: `[M, P R]`: the P segments' inputs side by side.
    :param b: `[N, R]`: the segments one under the other.
    :param widths: Columns of `dy` in each segment; they add up to N.
    :param scales: Of each segment.
    :param out: Memory for the gradient of `xa`; may be that of `xa`.
    :returns: `[M, P R]` in the dtype of `dy`, and `[N, R]` fp32 (fp64 for fp64).
    """
    rank, first = b.shape[1], 0
    dxa, db = [], []
    for index, (width, scale) in enumerate(zip(widths, scales, strict=True)):
        part, rows = widen(dy[:, first : first + width]), widen(b[first : first + width])
        dxa.append(part @ rows)
        db.append(part.T @ widen(xa[:, index * rank : (index + 1) * rank]) * scale)
        first += width
    found = torch.cat(dxa, dim=1).to(dy.dtype)
    return found if out is None else out.copy_(found), torch.cat(db)
