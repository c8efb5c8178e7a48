"""Rotary position embedding in plain PyTorch, with the roundings of transformers' `apply_rotary_pos_emb`."""

import torch

from ftcore_kernels.reference._precision import widen


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first `Dr` channels of every head of `q` and `k`; the other channels pass through.

    :param q: `[B, Hq, S, D]`.
    :param k: `[B, Hk, S, D]`.
    :param cos: `[B or 1, S, Dr]`, both members of a pair given, fp32 or the dtype of `q`.
    :param sin: As `cos`.
    :param interleaved: Pair channels `(2i, 2i + 1)` and round once (Cohere) instead of `(i, i + Dr / 2)` (Llama).
    :returns: The rotated `q` and `k`, in their own dtypes also where the tables are fp32.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        turned = widen(turned)
    turned = turned * cos + _quarter_turn(turned, interleaved) * sin
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def _quarter_turn(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Send each pair `(a, b)` to `(-b, a)`."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
