"""The residual addition and the RMS normalisation after it in plain PyTorch, rounded as transformers does."""

from typing import Literal

import torch

from ftcore_kernels.reference.rms_norm import rms_norm


def add_rms_norm(
    residual: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    cast: Literal["llama", "gemma"] = "llama",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `x` to `residual`, and normalise the sum as `rms_norm` does.

    :param residual: `[..., H]`.
    :param x: The shape and dtype of `residual`.
    :param weight: `[H]`.
    :param eps: Added to the mean square.
    :param offset: Added to the weight; 1 for Gemma.
    :param cast: Where to round. `"llama"`: to `x.dtype` before the weight. `"gemma"`: once, at the end.
    :returns: The sum, `[..., H]` in `x.dtype`, and the sum normalised, in `x.dtype` for gemma and in the promotion of
        `x.dtype` and `weight.dtype` for llama.
    """
    total = residual + x
    return total, rms_norm(total, weight, eps, offset, cast)
