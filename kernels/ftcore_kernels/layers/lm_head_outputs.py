"""What a causal language model with the fused head answers instead of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class FusedLoss(ModelOutput):
    """Answer to `fused_loss=True`: the loss, and sums over the supervised tokens for a trainer's metrics."""

    loss: torch.Tensor | None = None
    """fp32, a scalar, with its gradient."""
    entropy_sum: torch.Tensor | None = None
    """fp32, a scalar: entropies of the predicted distributions, in nats."""
    top1_sum: torch.Tensor | None = None
    """int64, a scalar: tokens that were the likeliest one."""
    tokens: int | None = None
    """Supervised tokens; a plain number, since the host knows it."""


@dataclass
class FusedTokens(ModelOutput):
    """Answer to `fused_lm_head=True`, with the fields of TRL's `FusedCausalLMOutput`.

    Each is `[B, S - 1]`, or `[B, S]` with `shift_labels`, and 0 where the label is ignored. Only `log_probs` and `loss`
    have gradients. What this head does not compute is None.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
