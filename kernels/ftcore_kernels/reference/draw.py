"""Draws a token from each row of logits, by noise that depends on nothing but a seed and a count, in plain PyTorch.

The Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030): the largest of `logit / T + G`, with G from
the standard Gumbel distribution, is a draw from the softmax. The noise is a hash of the row's seed, the number of the
draw and the token: the same draw comes out whatever else is in the batch, on every device.
"""

from __future__ import annotations

import torch

from ftcore_kernels.reference._hash import GOLDEN, WORD, mix, spread


def draw(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    counts: torch.Tensor,
    temperature: float,
    allowed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token for each row, and its log-probability.

    :param logits: `[B, V]`, rows contiguous.
    :param seeds: Int64 `[B]`, of which the low 32 bits count.
    :param counts: Int64 `[B]`: how many tokens the row has drawn.
    :param temperature: Divides the logits; 0 takes the largest.
    :param allowed: Bool `[B, V]`: the tokens that may be drawn, or None for all.
    :returns: Int64 `[B]`, and fp32 `[B]` in nats at this temperature (at 1 for 0), over all tokens.
    """
    wide = logits.float()
    scaled = wide if temperature in (0, 1) else wide / temperature
    score = scaled if temperature == 0 else scaled + gumbel(seeds, counts, logits.shape[1])
    if allowed is not None:
        score = score.masked_fill(~allowed, -torch.inf)
    token = score.argmax(-1)
    chosen = scaled.gather(1, token[:, None])[:, 0]
    return token, chosen - scaled.logsumexp(-1)


def gumbel(seeds: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """Noise `[B, width]`, fp32."""
    key = mix((mix(seeds & WORD) + counts * GOLDEN) & WORD)
    bits = spread(key[:, None], torch.arange(width, device=seeds.device))
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # exact, and never 0 or 1
    return -torch.log(-torch.log(uniform))
