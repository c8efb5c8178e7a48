"""From a step's logits to the next token of every row, on the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ftcore import Sampling


class Sampler:
    """Draws as `Sampling` says; `seen` is bool `[B, V]` where tokens are penalised for coming again, else None."""

    def __init__(self, sampling: Sampling, draw: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._draw, self.penalty = draw, sampling.repetition_penalty
        self.temperature = sampling.temperature
        self._filters = [] if self.temperature == 0 else _filters(sampling)

    def __call__(
        self, logits: torch.Tensor, seeds: torch.Tensor, counts: torch.Tensor, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 `[B]` and their log-probabilities fp32 `[B]`, of logits `[B, V]`.

        Those are of the distribution at this temperature, before tokens are left out of it and repeated ones made less
        likely: what a trainer computes.
        """
        own = logits
        if seen is not None:  # Keskar et al. 2019, arXiv 1909.05858
            logits = logits.float()
            logits = torch.where(seen, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)
        allowed = None
        if self._filters:
            scores = logits.float() / self.temperature
            for left in self._filters:
                scores = left(None, scores)
            allowed = scores > -torch.inf
        tokens, logprobs = self._draw(logits, seeds, counts, self.temperature, allowed)
        if seen is not None:
            own = own.float() / (self.temperature or 1.0)
            logprobs = own.gather(1, tokens[:, None])[:, 0] - own.logsumexp(-1)
        return tokens, logprobs


def _filters(sampling: Sampling) -> list[Any]:
    """transformers' own, in the order in which its `generate` applies them."""
    from transformers.generation import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found: list[Any] = []
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found
