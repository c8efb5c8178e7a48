"""The language model's head and its cross entropy together, on the supervised rows only, a chunk of logits at a time.

Rows whose label is ignored are gathered away before the matrix product. Each chunk's logits become its gradients at
once, so that no more than a chunk of either is ever alive: the forward does all the work, and the backward multiplies
by what comes from above: exactly if that is a power of two, else with one rounding more. The products are cuBLAS's;
16-bit inputs give fp32 logits.
"""

# Triton has no types.
# mypy: disable-error-code="import-untyped,no-untyped-call,no-untyped-def,untyped-decorator"

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ftcore_kernels.ops import _launch
from ftcore_kernels.ops.cross_entropy import Form, check_form, check_labels, gradients, losses


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

    :param hidden: `[..., H]`, fp16, bf16 or fp32.
    :param weight: `[V, H]`, in the dtype of `hidden`. Its gradient is accumulated in fp32, if it wants one.
    :param labels: `[...]`, int64 or int32, already shifted, in `[0, V)` or `ignore_index`; another one gives NaN.
    :param normalizer: What to divide by: the number of supervised tokens of the whole optimizer step. A tensor of one
        element stays on its device. With no supervised row the loss is 0, also if this is 0.
    :param ignore_index: Rows with this label take no part.
    :param softcap: Replace the scaled logits x by `softcap * tanh(x / softcap)`; 0 for no cap.
    :param scale: Multiplies the logits, before the cap.
    :param smoothing: Label smoothing as in PyTorch.
    :param bias: `[V]` in the dtype of `hidden`, or None.
    :param rows: `[n]` int64, indices into the flattened labels that name every supervised row once; ignored rows among
        them count nothing, so a collator may pad it with such. Without it the rows are looked up on the device, and
        the host waits for their number.
    :param chunk: Rows of logits alive at a time.
    :param metrics: A dictionary to be filled, for the rows taken: `rows`, their indices; `top1`, bool, whether no
        other logit exceeds the label's; `entropy`, fp32, of the predicted distribution. No gradients.
    :returns: The loss, fp32, a scalar.
    """
    form = check_form(Form(ignore_index, softcap, scale, smoothing))
    check_head(hidden, weight, bias, labels, chunk)
    if rows is None:
        rows = supervised_rows(labels, ignore_index)
    if not isinstance(normalizer, torch.Tensor):
        normalizer = torch.full((), normalizer, dtype=torch.float32, device=hidden.device)
    loss: torch.Tensor = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, normalizer, rows, form, chunk, metrics, torch.is_grad_enabled()
    )
    return loss


def check_head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, chunk: int
) -> None:
    """Refuse what is not a head and its labels."""
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    _launch.check(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and hidden {hidden.dtype}: the matrix product needs one dtype")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be [V, {hidden.shape[-1]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{weight.shape[0]}]")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1")
    check_labels(labels, hidden.shape[:-1], hidden.device)


def supervised_rows(labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Return the rows to take, `[n]` int64. The host waits for n."""
    return torch.nonzero(labels.reshape(-1) != ignore_index).squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        normalizer: torch.Tensor,
        rows: torch.Tensor,
        form: Form,
        chunk: int,
        metrics: dict[str, torch.Tensor] | None,
        grad_enabled: bool,
    ) -> torch.Tensor:
        device, number = hidden.device, rows.numel()
        flat, labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).index_select(0, rows)
        loss, lse = (torch.empty(number, dtype=torch.float32, device=device) for _ in range(2))
        top1 = entropy = None
        if metrics is not None:
            top1 = torch.empty(number, dtype=torch.bool, device=device)
            entropy = torch.empty(number, dtype=torch.float32, device=device)
            metrics |= {"rows": rows, "top1": top1, "entropy": entropy}
        # 1 / normalizer, as a fraction near 1 for the row gradients, which fp16 could not hold when divided by
        # thousands of tokens, and a power of two for the end, where it costs no rounding.
        normalizer = normalizer.to(device, torch.float32).reshape(())
        inverse = normalizer.reciprocal()
        fraction = torch.frexp(inverse).mantissa
        power = torch.where(inverse.isfinite(), inverse / fraction, 1.0)
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        grads = HeadGradients(hidden, weight, bias, number, wanted)
        with torch.autocast(device.type, enabled=False):
            for first in range(0, number, chunk):
                part = slice(first, first + chunk)
                h = flat.index_select(0, rows[part])
                logits = project(h, weight, bias)
                losses(
                    logits, labels[part], form, loss[part], lse[part],
                    None if top1 is None else top1[part], None if entropy is None else entropy[part],
                )  # fmt: skip
                if any(wanted):
                    dlogits = torch.empty(logits.shape, dtype=h.dtype, device=device)
                    dloss = fraction.expand(logits.shape[0])
                    gradients(logits, labels[part], form, lse[part], dloss, None, dlogits)
                    del logits
                    grads.add(part, h, weight, dlogits)
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias, rows, power)
        ctx.shape, ctx.dtypes = hidden.shape, [None if x is None else x.dtype for x in (hidden, weight, bias)]
        total = loss.sum()
        return torch.where(total == 0, total, total / normalizer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, rows, power = ctx.saved_tensors
        # One dimension: a scalar would be rounded to the 16 bits of the tensor that it multiplies.
        factor = (dloss * power).reshape(1)
        grads = []
        for tensor, dtype in zip(tensors, ctx.dtypes, strict=True):
            if tensor is not None:
                out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
                tensor = torch.mul(tensor, factor, out=out)
            grads.append(tensor)
        if grads[0] is not None:
            grads[0] = scatter(grads[0], rows, ctx.shape)
        return *grads, *(None,) * 7


class HeadGradients:
    """The gradients of the hidden states of the rows taken, of weight and of bias, or None, filled by chunks."""

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, number: int, wanted: list[bool]
    ) -> None:
        self.hidden = hidden.new_empty((number, hidden.shape[-1])) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None

    def add(self, part: slice, h: torch.Tensor, weight: torch.Tensor, dlogits: torch.Tensor) -> None:
        """Take a chunk: `h` [n, H] are the hidden states of these of the rows, `dlogits` [n, V] their gradient."""
        if self.hidden is not None:
            torch.mm(dlogits, weight, out=self.hidden[part])
        if self.weight is not None:
            if h.dtype == torch.float32:
                self.weight.addmm_(dlogits.T, h)
            elif h.device.type == "cuda":
                torch.addmm(self.weight, dlogits.T, h, out_dtype=torch.float32, out=self.weight)
            else:
                self.weight.addmm_(dlogits.T.float(), h.float())
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=torch.float32)


def scatter(values: torch.Tensor, rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Place the values `[n, ...]` of `rows` in zeros of `shape`, whose leading dimensions are one for `rows`."""
    rest = values.shape[1:]
    number = math.prod(shape[: len(shape) - len(rest)])
    return values.new_zeros((number, *rest)).index_copy_(0, rows, values).view(shape)


def project(h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the logits `[n, V]` in fp32, whatever the dtype of `h` `[n, H]`."""
    if h.dtype == torch.float32:
        logits = torch.mm(h, weight.T)
    elif h.device.type == "cuda":
        logits = torch.mm(h, weight.T, out_dtype=torch.float32)
    else:
        logits = torch.mm(h.float(), weight.T.float())
    return logits if bias is None else logits.add_(bias)
