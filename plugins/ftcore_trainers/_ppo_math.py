"""The formulas of PPO (Schulman et al. 2017, arXiv 1707.06347) on completions, each on tensors `[rows, tokens]`.

Token t of a completion is the action, what stands before it the state, and the completion the episode. `mask` is 1 for
tokens of a completion, its end included, and 0 for the padding after it. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KLCoefficient:
    """How much a difference from the reference model costs; with a target, it follows it.

    The controller of Ziegler et al. 2019 (arXiv 1909.08593), section 2.2.
    """

    value: float
    target: float | None = None
    """Wanted KL divergence of a completion in nats, summed over its tokens; None keeps the value."""
    horizon: float = 10_000.0
    """Completions over which a difference of 20 % from the target is made up for by a factor of e^0.2."""

    def follow(self, kl: float, completions: int) -> None:
        """Take note of the mean KL divergence of so many completions."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * completions / self.horizon


def token_rewards(scores: Tensor, logprobs: Tensor, reference: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef (log p - log p_ref) for each token, and the completion's score on top of its last.

    :param scores: One for each completion `[rows]`.
    :param logprobs: Of the tokens, under the policy that wrote them and, as `reference`, under the reference model.
    """
    rewards = -kl_coef * (logprobs - reference) * mask
    last = (mask.long().sum(1) - 1).clamp(min=0)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype)) * mask


def advantages_of(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438): sum of (gamma lam)^l delta_{t+l}.

    delta_t = r_t + gamma V_{t+1} - V_t. Nothing follows a completion: the value after its last token is 0.
    """
    advantages = torch.zeros_like(rewards)
    following, value_after = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value_after - values[:, t]
        # The padding is no part of the episode: behind the last token both are 0.
        following = (delta + gamma * lam * following) * mask[:, t]
        value_after = values[:, t] * mask[:, t]
        advantages[:, t] = following
    return advantages


def whiten(x: Tensor, mask: Tensor, shift: bool = True) -> Tensor:
    """To a variance of 1 over all tokens of the mask, and to a mean of 0 unless `shift` is off; 0 elsewhere."""
    count = mask.sum().clamp(min=1)
    mean = (x * mask).sum() / count
    variance = (((x - mean) * mask) ** 2).sum() / count
    white = (x - mean) / (variance + 1e-8).sqrt()
    return (white if shift else white + mean) * mask


@dataclass(frozen=True)
class Sums:
    """A loss summed over the tokens of the mask, and how many of them were clipped."""

    loss: Tensor
    clipped: Tensor


def policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Sums:
    """max(-A r, -A clip(r, 1 - clip, 1 + clip)), with r = p_new / p_old of each token."""
    ratio = ((new - old) * mask).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return Sums((torch.maximum(plain, clipped) * mask).sum(), ((clipped > plain) * mask).sum())


def value_loss(new: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Sums:
    """max((V - R)^2, (V_clipped - R)^2) / 2, with V_clipped within `clip` of the value at the rollout."""
    plain, clipped = (new - returns) ** 2, (old + (new - old).clamp(-clip, clip) - returns) ** 2
    return Sums((torch.maximum(plain, clipped) * mask).sum() / 2, ((clipped > plain) * mask).sum())


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(R - V) / Var(R) over the tokens of the mask; nan where all returns are the same."""
    tokens = mask.bool()
    variance = returns[tokens].var(correction=0)
    return (
        1 - (returns - values)[tokens].var(correction=0) / variance if variance > 0 else variance.new_tensor(torch.nan)
    )
