"""RMS normalisation in plain PyTorch, with the roundings of transformers' LlamaRMSNorm and Gemma2RMSNorm."""

from typing import Literal

import torch

from ftcore_kernels.reference._precision import widen


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, cast: Literal["llama", "gemma"] = "llama"
) -> torch.Tensor:
    """Scale each row of `x` to unit root mean square, then by `offset + weight`.

    :param x: `[..., H]`.
    :param weight: `[H]`.
    :param eps: Added to the mean square.
    :param offset: Added to the weight; 1 for Gemma.
    :param cast: Where to round. `"llama"`: to `x.dtype` before the weight. `"gemma"`: once, at the end.
    :returns: `[..., H]` in `x.dtype` for gemma, in the promotion of `x.dtype` and `weight.dtype` for llama.
    """
    if cast not in ("llama", "gemma"):
        raise ValueError(f"cast is {cast!r}; it must be 'llama' or 'gemma'")
    hidden = widen(x)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    if cast == "gemma":
        return (hidden * (offset + widen(weight))).type_as(x)
    scale = offset + weight if offset else weight
    return scale * hidden.to(x.dtype)
