"""The language model's head and its cross entropy in plain PyTorch, on the supervised rows, a chunk at a time."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ftcore_kernels.reference.cross_entropy import cross_entropy, transformed


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    normalizer: torch.Tensor | float,
    ignore_index: int = -100,
    softcap: float = 0.0,
    scale: float = 1.0,
    smoothing: float = 0.0,
    bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    chunk: int = 1024,
    metrics: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return the cross entropy of `hidden @ weight.T + bias`, summed over the supervised rows and then divided.

    :param hidden: `[..., H]`.
    :param weight: `[V, H]`, in the dtype of `hidden`, in which the logits are too.
    :param labels: `[...]`, int64 or int32, already shifted, in `[0, V)` or `ignore_index`.
    :param normalizer: What to divide by. With no supervised row the loss is 0, also if this is 0.
    :param ignore_index: Rows with this label take no part.
    :param softcap: Replace the scaled logits x by `softcap * tanh(x / softcap)`; 0 for no cap.
    :param scale: Multiplies the logits, before the cap.
    :param smoothing: Label smoothing as in PyTorch.
    :param bias: `[V]` or None.
    :param rows: `[n]` int64, indices into the flattened labels that name every supervised row once.
    :param chunk: Rows of logits alive at a time; the backward makes them again.
    :param metrics: A dictionary to be filled, for the rows taken: `rows`, `top1` and `entropy`.
    :returns: The loss, fp32 (fp64 for fp64), a scalar.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the rows have shape {tuple(hidden.shape[:-1])}")
    labels, flat = labels.reshape(-1).long(), hidden.reshape(-1, hidden.shape[-1])
    if rows is None:
        rows = torch.nonzero(labels != ignore_index).squeeze(1)

    def part_loss(h: torch.Tensor, part_labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, weight, bias)
        return cross_entropy(logits, part_labels, ignore_index, softcap, scale, smoothing)[0]

    parts = [checkpoint(part_loss, flat[part], labels[part], use_reentrant=False) for part in torch.split(rows, chunk)]
    kept = labels[rows] != ignore_index
    if metrics is not None:
        known = labels.where(labels != ignore_index, 0)
        top1, entropy = head_metrics(flat, weight, bias, known, rows, chunk, softcap, scale, 1.0)
        metrics |= {"rows": rows, "top1": top1 & kept, "entropy": entropy.masked_fill(~kept, 0.0)}
    total = torch.cat(parts).sum()
    divisor = torch.as_tensor(normalizer, dtype=total.dtype, device=total.device).reshape(())
    return total / torch.where(kept.any(), divisor, 1.0)


@torch.no_grad()
def head_metrics(
    flat: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    rows: torch.Tensor,
    chunk: int,
    softcap: float,
    scale: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whether the label has the highest logit, and the entropy, of the given rows of `flat` `[N, H]`."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for part in torch.split(rows, chunk):
        z = transformed(F.linear(flat[part], weight, bias), softcap, scale) / temperature
        target = z.gather(1, labels[part].unsqueeze(1)).squeeze(1)
        # entr() of p == 0 is 0.
        found.append((target >= z.amax(1), torch.special.entr(z.softmax(1)).sum(1)))
    top1, entropy = zip(*found, strict=True)
    return torch.cat(top1), torch.cat(entropy)
