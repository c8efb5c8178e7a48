"""The gated activation of Llama-like MLPs in plain PyTorch, with the roundings of transformers' LlamaMLP."""

import torch
import torch.nn.functional as F

from ftcore_kernels.reference._precision import widen


def swiglu(gate: torch.Tensor, up: torch.Tensor, round_silu: bool = True) -> torch.Tensor:
    """Return `silu(gate) * up`.

    :param gate: `[..., I]`.
    :param up: The shape and dtype of `gate`.
    :param round_silu: Round `silu(gate)` to the input dtype before the product, as transformers does; or round once.
    :returns: The shape and dtype of `gate`.
    """
    if round_silu:
        return F.silu(gate) * up
    return (F.silu(widen(gate)) * widen(up)).to(gate.dtype)
