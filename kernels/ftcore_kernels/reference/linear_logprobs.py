"""Log-probabilities of given tokens under the language model's head in plain PyTorch, a chunk of logits at a time."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ftcore_kernels.reference.cross_entropy import transformed
from ftcore_kernels.reference.linear_cross_entropy import head_metrics


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    softcap: float = 0.0,
    scale: float = 1.0,
    ignore_index: int = -100,
    bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    chunk: int = 1024,
    metrics: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the log-probability of every target under the softmax of `hidden @ weight.T + bias`.

    :param hidden: `[..., H]`.
    :param weight: `[V, H]`, in the dtype of `hidden`, in which the logits are too.
    :param targets: `[...]`, int64 or int32, already shifted, in `[0, V)` or `ignore_index`.
    :param temperature: Divides the logits, after the cap.
    :param softcap: Replace the scaled logits x by `softcap * tanh(x / softcap)`; 0 for no cap.
    :param scale: Multiplies the logits, before the cap.
    :param ignore_index: Rows with this target take no part.
    :param bias: `[V]` or None.
    :param rows: `[n]` int64, indices into the flattened targets, each at most once: the rows to take.
    :param chunk: Rows of logits alive at a time; the backward makes them again.
    :param metrics: A dictionary to be filled, in the shape of `targets`: `top1` and `entropy`.
    :returns: fp32 (fp64 for fp64), in the shape of `targets`; 0 in rows that were not taken.
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(targets.shape)}, the rows have shape {tuple(hidden.shape[:-1])}")
    labels, flat = targets.reshape(-1).long(), hidden.reshape(-1, hidden.shape[-1])
    if rows is None:
        rows = torch.nonzero(labels != ignore_index).squeeze(1)
    kept = labels[rows] != ignore_index
    labels = labels.where(labels != ignore_index, 0)

    def part_logprobs(h: torch.Tensor, part_labels: torch.Tensor) -> torch.Tensor:
        z = transformed(F.linear(h, weight, bias), softcap, scale) / temperature
        return z.log_softmax(1).gather(1, part_labels.unsqueeze(1)).squeeze(1)

    parts = [
        checkpoint(part_logprobs, flat[part], labels[part], use_reentrant=False) for part in torch.split(rows, chunk)
    ]
    logprobs = torch.cat(parts).masked_fill(~kept, 0.0)
    out = logprobs.new_zeros(labels.shape).index_copy(0, rows, logprobs)
    if metrics is not None:
        top1, entropy = head_metrics(flat, weight, bias, labels, rows, chunk, softcap, scale, temperature)
        metrics["top1"] = kept.new_zeros(labels.shape).index_copy(0, rows, top1 & kept).view(targets.shape)
        entropy = entropy.masked_fill(~kept, 0.0)
        metrics["entropy"] = entropy.new_zeros(labels.shape).index_copy(0, rows, entropy).view(targets.shape)
    return out.view(targets.shape)
