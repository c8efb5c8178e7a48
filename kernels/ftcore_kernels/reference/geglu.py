"""The gated activation of Gemma-like MLPs in plain PyTorch, with the roundings of transformers' GemmaMLP."""

from typing import Literal

import torch
import torch.nn.functional as F

from ftcore_kernels.reference._precision import widen


def geglu(
    gate: torch.Tensor, up: torch.Tensor, approximate: Literal["tanh", "none"] = "tanh", round_gelu: bool = True
) -> torch.Tensor:
    """Return `gelu(gate) * up`.

    :param gate: `[..., I]`.
    :param up: The shape and dtype of `gate`.
    :param approximate: `"tanh"` (Gemma: `gelu_pytorch_tanh`) or `"none"`, the exact form.
    :param round_gelu: Round `gelu(gate)` to the input dtype before the product, as transformers does; or round once.
    :returns: The shape and dtype of `gate`.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate is {approximate!r}; it must be 'tanh' or 'none'")
    if round_gelu:
        return F.gelu(gate, approximate=approximate) * up
    return (F.gelu(widen(gate), approximate=approximate) * widen(up)).to(gate.dtype)
