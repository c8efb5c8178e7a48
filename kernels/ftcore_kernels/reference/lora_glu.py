"""The gated activation between the products of an MLP in plain PyTorch, with LoRA's part, rounded once."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F

from ftcore_kernels.reference._precision import widen
from ftcore_kernels.reference.lora_rope import Update, updated

Activation = Literal["silu", "gelu_tanh", "gelu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def lora_glu(gate_up: torch.Tensor, activation: Activation = "silu", update: Update | None = None) -> torch.Tensor:
    """Return `activation(gate) * up`.

    :param gate_up: `[M, 2 I]`: the gate's columns, then the other's.
    :param activation: `"silu"`, `"gelu_tanh"` or `"gelu"`.
    :param update: LoRA's part of both projections, or None.
    :returns: `[M, I]`.
    """
    gate, up = _parts(gate_up, update)
    return (_activate(gate, activation) * up).to(gate_up.dtype)


def lora_glu_backward(
    dout: torch.Tensor,
    gate_up: torch.Tensor,
    activation: Activation = "silu",
    update: Update | None = None,
    dxa: torch.Tensor | None = None,
    a: torch.Tensor | None = None,
) -> None:
    """Overwrite `gate_up` with its gradient and `dout` with the activation.

    :param dout: `[M, I]`: the gradient of the activation, through the down projection's frozen weight.
    :param gate_up: `[M, 2 I]`, what the forward was given.
    :param update: What the forward was given.
    :param dxa: `[M, R]`: the gradient of the down projection's `x A^T`, or None without LoRA there.
    :param a: `[R, I]`: its A.
    """
    wide = widen(dout)
    if dxa is not None and a is not None:
        wide = wide + widen(dxa) @ widen(a)
    gate, up = (part.detach().requires_grad_() for part in _parts(gate_up, update))
    with torch.enable_grad():
        activated = _activate(gate, activation)
    dgate = torch.autograd.grad(activated, gate, wide * up.detach())[0]
    activated = activated.detach()
    dgate_up = torch.cat((dgate, wide * activated), dim=1)
    dout.copy_(activated * up.detach())
    gate_up.copy_(dgate_up)  # last: gate and up may be views of it


def _parts(gate_up: torch.Tensor, update: Update | None) -> tuple[torch.Tensor, torch.Tensor]:
    width = gate_up.shape[1] // 2
    gate, up = updated(gate_up, (width, width), update).chunk(2, dim=1)
    return gate, up


def _activate(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")
