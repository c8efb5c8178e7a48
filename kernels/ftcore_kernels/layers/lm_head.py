"""The head of a causal language model and its loss as one op, so that the logits of all tokens never exist.

Bound to the `...ForCausalLM` instance. What is asked decides what is answered:

* no labels (generation, plain logits), or labels in evaluation without gradients: the class's own forward;
* labels: `CausalLMOutputWithPast` with the loss and no logits;
* labels and `fused_loss=True`: :class:`FusedLoss`, for supervised fine-tuning;
* labels and `fused_lm_head=True`: :class:`FusedTokens`, for losses on log-probabilities, as TRL's trainers ask it.

What the op does not cover (an adapter on the head, a router's loss, a loss function of one's own) is computed by the
class's own forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ftcore import Role, bind
from ftcore_kernels.layers.decoder.attention import handed
from ftcore_kernels.layers.host_weights import HostWeights
from ftcore_kernels.layers.kv_cache import cache_of
from ftcore_kernels.layers.lm_head_outputs import FusedLoss, FusedTokens
from ftcore_kernels.layers.lm_head_parts import (
    IGNORED,
    Targets,
    head_of,
    mean_logits,
    next_tokens,
    operands,
    routes,
    slow_logprobs,
    takes_plain_loss,
)

SETTINGS = "ftcore_lm_head"
"""Attribute of a module with this head: its :class:`Settings`. By it a trainer knows that the head is there."""


@dataclass
class Settings:
    """What a trainer may set."""

    temperature: float = 1.0
    """Divides the logits of `fused_lm_head=True`; a loss asked for in another way is at temperature 1."""
    mean_logits: bool = False
    """Whether `fused_lm_head=True` answers with `mean_logits`."""


@dataclass(frozen=True)
class FusedHead:
    """The answers of one implementation, in place of `plain`, the class's own forward."""

    plain: Callable[..., Any]
    cross_entropy: Callable[..., torch.Tensor]
    logprobs: Callable[..., torch.Tensor]

    def output(self, module: Any, head: nn.Linear, targets: Targets, kwargs: dict[str, Any]) -> CausalLMOutputWithPast:
        """What transformers returns, less the logits."""
        out = _backbone(module, kwargs)
        arguments, options = operands(module, out.last_hidden_state, head, targets)
        return CausalLMOutputWithPast(
            loss=self.cross_entropy(*arguments, normalizer=targets.normalizer, **options),
            **cache_of(out),
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def loss(self, module: Any, targets: Targets, kwargs: dict[str, Any]) -> FusedLoss:
        """The loss, whose gradient is computed in the same pass, and the sums of the metrics."""
        metrics: dict[str, torch.Tensor] = {}
        if (head := head_of(module)) is None:
            loss = targets.mean_nll(slow_logprobs(self._logits(module, kwargs), targets, 1.0, metrics))
        else:
            arguments, options = operands(module, _backbone(module, kwargs).last_hidden_state, head, targets)
            loss = self.cross_entropy(*arguments, normalizer=targets.normalizer, metrics=metrics, **options)
        return FusedLoss(
            loss=loss,
            entropy_sum=metrics["entropy"].sum(),
            top1_sum=metrics["top1"].sum(),
            tokens=targets.rows.numel(),
        )

    def tokens(self, module: Any, targets: Targets, kwargs: dict[str, Any], *, shifted: bool) -> FusedTokens:
        """The log-probability of every next token, for a loss of the trainer's own."""
        metrics: dict[str, torch.Tensor] = {}
        settings: Settings = getattr(module, SETTINGS)
        temperature, means = settings.temperature, None
        if (head := head_of(module)) is None:
            logits = self._logits(module, kwargs)
            logprobs = slow_logprobs(logits, targets, temperature, metrics)
            if settings.mean_logits:
                means = logits.detach().mean(-1, dtype=torch.float32).div(temperature) * (targets.labels != IGNORED)
        else:
            arguments, options = operands(module, _backbone(module, kwargs).last_hidden_state, head, targets)
            logprobs = self.logprobs(*arguments, temperature=temperature, metrics=metrics, **options)
            if settings.mean_logits:
                means = mean_logits(*arguments, temperature=temperature, **options)
        # Nothing follows the last token: its column is the padding of the shift.
        width = logprobs.shape[1] - (0 if shifted else 1)
        return FusedTokens(
            loss=targets.mean_nll(logprobs),
            log_probs=logprobs[:, :width],
            entropy=metrics["entropy"][:, :width],
            mean_logits=None if means is None else means[:, :width],
            is_top1=metrics["top1"][:, :width],
            label_mask=targets.labels.to(logprobs.device)[:, :width] != IGNORED,
        )

    def _logits(self, module: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        logits: torch.Tensor = self.plain(module, **kwargs | {"return_dict": True}).logits
        return logits


def _backbone(module: Any, kwargs: dict[str, Any]) -> Any:
    inputs = {name: value for name, value in kwargs.items() if name != "logits_to_keep"}
    return module.base_model(**inputs | {"return_dict": True})


def install_triton(module: nn.Module, role: Role) -> None:
    """Bind the Triton ops."""
    from ftcore_kernels.ops.linear_cross_entropy import linear_cross_entropy
    from ftcore_kernels.ops.linear_logprobs import linear_logprobs

    _install(module, FusedHead(type(module).forward, linear_cross_entropy, linear_logprobs))


def install_reference(module: nn.Module, role: Role) -> None:
    """Bind the plain PyTorch ops."""
    from ftcore_kernels.reference.linear_cross_entropy import linear_cross_entropy
    from ftcore_kernels.reference.linear_logprobs import linear_logprobs

    _install(module, FusedHead(type(module).forward, linear_cross_entropy, linear_logprobs))


def _install(module: nn.Module, fused: FusedHead) -> None:
    setattr(module, SETTINGS, Settings())
    module.ftcore_host_weights = HostWeights(module)
    bind(module, forward_of(fused))


def forward_of(fused: FusedHead) -> Callable[..., Any]:
    """The forward to bind, with the signature of the class's: `generate` and transformers' Trainer read it."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(fused.plain).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in by_position][1:]

    @functools.wraps(fused.plain)
    def forward(
        module: Any,
        *args: Any,
        fused_lm_head: bool = False,
        fused_loss: bool = False,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        supervised: torch.Tensor | None = None,
        begins: Any = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids [B, S], labels or shift_labels [B, S] -> see the module's docstring.

        `supervised` [n] int64 spares the wait for the device that finding the supervised among the B S tokens is, and
        `begins`, a NumPy bool [B, S] that says which tokens are the first of their documents, or `Branches`, the one
        for the mask.
        Raises TypeError for a fused answer without labels, NotImplementedError for one with a router's loss.
        """
        if len(args) > len(names):
            raise TypeError(f"forward takes {len(names)} arguments by position, and {len(args)} were given")
        kwargs |= zip(names, args, strict=False)
        labels = kwargs.pop("labels", None)
        labelled = labels is not None or shift_labels is not None
        if fused_lm_head or fused_loss:
            _check_fused(module, labelled, kwargs)
            targets = next_tokens(labels, shift_labels, num_items_in_batch, supervised)
            kwargs = handed(module.base_model, kwargs | {"use_cache": False}, begins)
            if fused_loss:
                return fused.loss(module, targets, kwargs)
            return fused.tokens(module, targets, kwargs, shifted=shift_labels is not None)
        if labelled and takes_plain_loss(module, kwargs) and (head := head_of(module)) is not None:
            targets = next_tokens(labels, shift_labels, num_items_in_batch, supervised)
            return fused.output(module, head, targets, handed(module.base_model, kwargs, begins))
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        return fused.plain(module, **kwargs, **{name: value for name, value in given.items() if value is not None})

    return forward


def _check_fused(module: Any, supervised: bool, kwargs: dict[str, Any]) -> None:
    if not supervised:
        raise TypeError("fused_lm_head=True and fused_loss=True need labels or shift_labels")
    if routes(module, kwargs):
        raise NotImplementedError("the fused head has no router loss: set output_router_logits=False")
