"""Cross entropy of rows of logits in plain PyTorch, in fp32 as transformers computes it."""

import torch
import torch.nn.functional as F

from ftcore_kernels.reference._precision import widen


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ignore_index: int = -100,
    softcap: float = 0.0,
    scale: float = 1.0,
    smoothing: float = 0.0,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's cross entropy and log-sum-exp; both have gradients (the second for a z-loss).

    :param logits: `[..., V]`.
    :param labels: `[...]`, int64 or int32, in `[0, V)` or `ignore_index`.
    :param ignore_index: Rows with this label have loss 0, log-sum-exp 0 and gradient 0.
    :param softcap: Replace the scaled logits x by `softcap * tanh(x / softcap)`; 0 for no cap.
    :param scale: Multiplies the logits, before the cap.
    :param smoothing: Label smoothing as in PyTorch.
    :param inplace: Has no effect here: autograd needs the logits.
    :returns: Loss and log-sum-exp, fp32 (fp64 for fp64), in the shape of `labels`.
    """
    del inplace
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or 0 for none")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing is {smoothing}; it must be in [0, 1]")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, the rows have shape {tuple(logits.shape[:-1])}")
    labels = labels.long()
    kept = labels != ignore_index
    # Ignored rows are cleared first: 0 times the gradient of an infinite logit would be NaN.
    z = transformed(logits.masked_fill(~kept.unsqueeze(-1), 0.0), softcap, scale)
    loss = F.cross_entropy(
        z.flatten(0, -2) if z.dim() != 1 else z.unsqueeze(0),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=smoothing,
    )
    return loss.view(labels.shape), z.logsumexp(-1).masked_fill(~kept, 0.0)


def transformed(logits: torch.Tensor, softcap: float, scale: float) -> torch.Tensor:
    """Return the logits in fp32, scaled and then capped."""
    z = widen(logits)
    if scale != 1.0:
        z = z * scale
    return softcap * torch.tanh(z / softcap) if softcap else z
