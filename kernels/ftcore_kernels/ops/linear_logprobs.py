"""Log-probabilities of given tokens under the language model's head, a chunk of logits at a time.

For losses that weigh tokens by what the log-probabilities themselves decide (preferences, policy gradients): the
forward keeps one log-sum-exp per row, and the backward makes each chunk's logits again.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ftcore_kernels.ops.cross_entropy import Form, check_form, gradients, losses
from ftcore_kernels.ops.linear_cross_entropy import HeadGradients, check_head, project, scatter, supervised_rows


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

    :param hidden: `[..., H]`, fp16, bf16 or fp32.
    :param weight: `[V, H]`, in the dtype of `hidden`. Its gradient is accumulated in fp32, if it wants one.
    :param targets: `[...]`, int64 or int32, already shifted, in `[0, V)` or `ignore_index`; another one gives NaN.
    :param temperature: Divides the logits, after the cap.
    :param softcap: Replace the scaled logits x by `softcap * tanh(x / softcap)`; 0 for no cap.
    :param scale: Multiplies the logits, before the cap.
    :param ignore_index: Rows with this target take no part.
    :param bias: `[V]` in the dtype of `hidden`, or None.
    :param rows: `[n]` int64, indices into the flattened targets, each at most once: the rows to take. Without it they
        are those not ignored, looked up on the device, and the host waits for their number.
    :param chunk: Rows of logits alive at a time.
    :param metrics: A dictionary to be filled, in the shape of `targets`: `top1`, bool, whether no other logit exceeds
        the target's; `entropy`, fp32, of the distribution at this temperature. No gradients.
    :returns: fp32, in the shape of `targets`; 0 in rows that were not taken.
    """
    form = check_form(Form(ignore_index, softcap, scale, 0.0, temperature))
    check_head(hidden, weight, bias, targets, chunk)
    if rows is None:
        rows = supervised_rows(targets, ignore_index)
    out: torch.Tensor = _LinearLogprobs.apply(hidden, weight, bias, targets, rows, form, chunk, metrics)
    return out


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: torch.Tensor,
        form: Form,
        chunk: int,
        metrics: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        device, number = hidden.device, rows.numel()
        flat, labels = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).index_select(0, rows)
        loss, lse = (torch.empty(number, dtype=torch.float32, device=device) for _ in range(2))
        top1 = entropy = None
        if metrics is not None:
            top1 = torch.empty(number, dtype=torch.bool, device=device)
            entropy = torch.empty(number, dtype=torch.float32, device=device)
        with torch.autocast(device.type, enabled=False):
            for first in range(0, number, chunk):
                part = slice(first, first + chunk)
                logits = project(flat.index_select(0, rows[part]), weight, bias)
                losses(
                    logits, labels[part], form, loss[part], lse[part],
                    None if top1 is None else top1[part], None if entropy is None else entropy[part],
                )  # fmt: skip
                del logits
        if metrics is not None and top1 is not None and entropy is not None:
            metrics |= {"top1": scatter(top1, rows, targets.shape), "entropy": scatter(entropy, rows, targets.shape)}
        ctx.save_for_backward(hidden, weight, bias, labels, rows, lse)
        ctx.form, ctx.chunk = form, chunk
        return scatter(loss.neg_(), rows, targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, labels, rows, lse = ctx.saved_tensors
        flat, dloss = hidden.reshape(-1, hidden.shape[-1]), dout.reshape(-1).index_select(0, rows).neg_()
        grads = HeadGradients(hidden, weight, bias, rows.numel(), list(ctx.needs_input_grad[:3]))
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, rows.numel(), ctx.chunk):
                part = slice(first, first + ctx.chunk)
                h = flat.index_select(0, rows[part])
                logits = project(h, weight, bias)
                dlogits = torch.empty(logits.shape, dtype=h.dtype, device=h.device)
                gradients(logits, labels[part], ctx.form, lse[part], dloss[part], None, dlogits)
                del logits
                grads.add(part, h, weight, dlogits)
        return (
            None if grads.hidden is None else scatter(grads.hidden, rows, hidden.shape),
            None if grads.weight is None else grads.weight.to(weight.dtype),
            None if grads.bias is None else grads.bias.to(bias.dtype),
            *(None,) * 5,
        )
