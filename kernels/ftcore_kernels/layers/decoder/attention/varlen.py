"""Attention of documents in a row to other documents in a row, with the logarithms of its sums; in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch

Parts = list[tuple[slice, slice]]


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q `[T, Hq, D]`, k and v `[U, Hkv, D]` -> the output `[T, Hq, D]`, and log-sum-exp of the scores `[Hq, T]`.

    :param q_offsets: `[N + 1]`: where each document of queries begins, and T; document n sees keys of document n.
    :param k_offsets: The same of the keys.
    :param causal: A query sees no later key of its document; both are of the same lengths then.
    """
    out, lse = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q))
    for rows, columns in _parts(q_offsets, k_offsets):
        scores = _scores(q[rows], k[columns], scale, causal)
        lse[:, rows] = scores.logsumexp(-1)
        weights = (scores - lse[:, rows, None]).exp()
        out[rows] = torch.einsum("hts,shd->thd", weights, _spread(v[columns], q.shape[1]))
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, for an output and sums that may be of more keys than these.

    FlashAttention's formula (arXiv 2205.14135): P = exp(S - lse), dS = P (dout v^T - rowsum(dout out)).
    """
    grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    for rows, columns in _parts(q_offsets, k_offsets):
        keys, values = _spread(k[columns], heads), _spread(v[columns], heads)
        weights = (_scores(q[rows], k[columns], scale, causal) - lse[:, rows, None]).exp()
        delta = (dout[rows] * out[rows]).sum(-1).T[..., None]
        dscores = weights * (torch.einsum("thd,shd->hts", dout[rows], values) - delta)
        grads[0][rows] += scale * torch.einsum("hts,shd->thd", dscores, keys)
        dk = scale * torch.einsum("hts,thd->shd", dscores, q[rows])
        dv = torch.einsum("hts,thd->shd", weights, dout[rows])
        for grad, found in ((grads[1], dk), (grads[2], dv)):
            grad[columns] += found.unflatten(1, (-1, group)).sum(2)
    return grads


def _parts(q_offsets: torch.Tensor, k_offsets: torch.Tensor) -> Parts:
    documents = zip(pairwise(q_offsets.tolist()), pairwise(k_offsets.tolist()), strict=True)
    return [(slice(*rows), slice(*columns)) for rows, columns in documents if rows[1] > rows[0]]


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    scores = scale * torch.einsum("thd,shd->hts", q, _spread(k, q.shape[1]))
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return scores


def _spread(keys: torch.Tensor, heads: int) -> torch.Tensor:
    return keys.repeat_interleave(heads // keys.shape[1], 1)
