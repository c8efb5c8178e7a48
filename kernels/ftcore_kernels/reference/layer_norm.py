"""Layer normalisation in plain PyTorch: `torch.nn.LayerNorm`, also where the weight has another dtype."""

import torch
import torch.nn.functional as F

from ftcore_kernels.reference._precision import widen


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Shift and scale each row of `x` to mean 0 and variance 1, then multiply by `weight` and add `bias`.

    :param x: `[..., H]`.
    :param weight: `[H]`.
    :param bias: `[H]` or None.
    :param eps: Added to the (biased) variance.
    :returns: `[..., H]` in `x.dtype`.
    """
    if weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide_bias = None if bias is None else widen(bias)
    return F.layer_norm(widen(x), x.shape[-1:], widen(weight), wide_bias, eps).to(x.dtype)
