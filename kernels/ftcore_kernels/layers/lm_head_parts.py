"""What goes into the fused head: the next tokens, the head's matrix, and the form of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ftcore_kernels.layers.host_weights import HOST, weight_of

IGNORED = -100


@dataclass(frozen=True)
class Targets:
    """The next tokens, and which of them are supervised."""

    labels: torch.Tensor
    """[B, S] integers, one for each hidden state: the labels are shifted, not the hidden states cut into a copy."""
    rows: torch.Tensor
    """[n] int64, indices of the supervised ones among all B * S."""
    normalizer: torch.Tensor | int
    """Supervised tokens of the optimizer step, or n."""

    def mean_nll(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Minus the sum of log-probabilities [...] that are 0 where ignored, divided; 0 without supervised rows."""
        return -logprobs.sum() / (self.normalizer if self.rows.numel() else 1)


def next_tokens(
    labels: torch.Tensor | None,
    shift_labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
    rows: torch.Tensor | None = None,
) -> Targets:
    """Find the supervised rows, if they are not given.

    The host waits for their number, and so until everything before is done: this comes before the backbone is queued.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    if rows is None:
        rows = torch.nonzero(shift_labels.reshape(-1) != IGNORED).squeeze(1)
    return Targets(shift_labels, rows, rows.numel() if num_items_in_batch is None else num_items_in_batch)


def logit_form(config: Any) -> dict[str, float]:
    """Soft cap and scale of the logits, by the names that transformers' text configs have for them."""
    text = config.get_text_config()

    def first(*names: str) -> float | None:
        found: list[float] = [value for name in names if (value := getattr(text, name, None)) is not None]
        return found[0] if found else None

    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    if scale is None and (scaling := first("logits_scaling")) is not None:
        # Granite and MiniCPM3 divide by it. A family that multiplies says so by a trait, which this kernel lacks.
        scale = 1 / scaling
    return {"softcap": first("final_logit_softcapping") or 0.0, "scale": 1.0 if scale is None else scale}


def head_of(module: Any) -> nn.Linear | None:
    """The head, where it is a matrix product and nothing else: no adapter, no hook, no packed or offloaded weight."""
    head = module.get_output_embeddings()
    if type(head).__name__ == "ModulesToSaveWrapper" and not _hooked(head):  # PEFT's copy that is trained whole
        active = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[active[0]] if active else head.original_module
    if type(head) is not nn.Linear or _hooked(head):
        return None
    if "forward" in vars(head) and not hasattr(head, "_hf_hook") and not hasattr(head, HOST):
        return None  # accelerate's only moves the inputs to the device
    weight = head.weight
    fits = weight.is_floating_point() and weight.element_size() > 1 and weight.device.type != "meta"
    return head if fits else None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def rows_of_logits(vocabulary: int) -> int:
    """Rows of logits alive at a time: a power of two, enough for a full product, at most half a GiB in fp32."""
    most = max(2**29 // (4 * vocabulary), 1)
    return int(min(1 << (most.bit_length() - 1), 2048))


def operands(
    module: Any, hidden: torch.Tensor, head: nn.Linear, targets: Targets
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]:
    """What both ops take by position (`hidden` [B, S, H], weight, labels) and by name.

    In the dtype in which eager PyTorch would multiply: autocast's, or that of the hidden states.
    """
    device, dtype = head.weight.device, hidden.dtype
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
    options = {
        "rows": targets.rows.to(device),
        "bias": None if head.bias is None else head.bias.to(dtype),
        "chunk": rows_of_logits(head.weight.shape[0]),
    }
    arguments = (hidden.to(device, dtype), weight_of(head).to(dtype), targets.labels.to(device))
    return arguments, options | logit_form(module.config)


@torch.no_grad()
def mean_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    rows: torch.Tensor,
    bias: torch.Tensor | None,
    chunk: int,
    temperature: float,
    softcap: float,
    scale: float,
) -> torch.Tensor:
    """Means of the logits over the vocabulary, `[B, S]` fp32, 0 in rows that are not taken; arguments as of the ops.

    Without a cap the mean of the products is the product with the mean, which takes no logits at all.
    """
    flat, taken = hidden.reshape(-1, hidden.shape[-1]), []
    mean, offset = weight.mean(0, dtype=torch.float32), 0.0 if bias is None else bias.float().mean()
    for part in torch.split(rows, chunk):
        if not softcap:
            taken.append((flat[part].float() @ mean + offset) * scale)
        else:
            logits = F.linear(flat[part], weight, bias).float() * scale
            taken.append((logits / softcap).tanh_().mean(1) * softcap)
    means = torch.cat(taken) / temperature
    return means.new_zeros(labels.numel()).index_copy(0, rows, means).view(labels.shape)


def slow_logprobs(
    logits: torch.Tensor, targets: Targets, temperature: float, metrics: dict[str, torch.Tensor]
) -> torch.Tensor:
    """What `linear_logprobs` returns, [B, S] fp32, from the logits [B, S, V] of a head that the ops do not cover."""
    labels = targets.labels.to(logits.device)
    kept = labels != IGNORED
    logprobs = (logits.float() / temperature).log_softmax(-1)
    picked = logprobs.gather(-1, labels.where(kept, 0).unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        metrics["top1"] = (picked >= logprobs.amax(-1)) & kept
        metrics["entropy"] = torch.special.entr(logprobs.exp()).sum(-1).masked_fill(~kept, 0.0)
    return picked.masked_fill(~kept, 0.0)


def routes(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a router's loss is asked for."""
    asked = kwargs.get("output_router_logits")
    return bool(getattr(module.config.get_text_config(), "output_router_logits", False) if asked is None else asked)


def takes_plain_loss(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether all that a call with labels wants is the next-token loss that the op computes."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    keep, return_dict = kwargs.get("logits_to_keep", 0), kwargs.get("return_dict")
    return (
        (torch.is_grad_enabled() or module.training)  # an evaluation may want the logits
        and isinstance(keep, int)
        and keep == 0
        and (module.config.return_dict if return_dict is None else return_dict)
        and "ignore_index" not in kwargs
        and not routes(module, kwargs)
        and module.loss_function is ForCausalLMLoss
    )
