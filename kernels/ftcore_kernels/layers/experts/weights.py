"""The experts' weights as they are now, and the LoRA that PEFT put on them as parameters.

PEFT adds `B_e A_e` to every expert's weight before each forward pass: a second copy of all experts' weights, though a
batch may need few of them. Here the factors are read, and multiplied with the tokens instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ftcore_kernels.layers.uncovered import Uncovered

RANKS = 16
"""Ranks come in multiples of this, filled up with zeros: the grouped GEMM wants aligned rows."""


class Factors(NamedTuple):
    """LoRA on one parameter."""

    a: nn.Parameter
    """`[r E, K]`, the experts one under the other."""
    b: nn.Parameter
    """`[N, r E]`, where columns of one rank lie together: PEFT's layout."""
    scale: float

    def of_experts(self, experts: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A `[E, R, K]` and scale times B `[E, N, R]` in the dtype of the products."""
        a = self.a.to(dtype).view(experts, -1, self.a.shape[1])
        b = (self.b * self.scale).to(dtype).view(self.b.shape[0], -1, experts).permute(2, 0, 1)
        more = -a.shape[1] % RANKS
        return F.pad(a, (0, 0, 0, more)), F.pad(b, (0, more)).contiguous()


def read(module: Any) -> tuple[Any, dict[str, Factors]]:
    """The experts' own module under PEFT's wrappers, and what is active on its parameters, by their names."""
    found: dict[str, Factors] = {}
    while hasattr(module, "base_layer"):
        if not hasattr(module, "parameter_name"):
            raise Uncovered(f"{type(module).__name__} is no adapter of a parameter")
        if module.merged_adapters:
            raise Uncovered("an adapter is merged")
        active = [] if module.disable_adapters else [n for n in module.active_adapters if n in module.lora_A]
        if len(active) > 1:
            raise Uncovered("several adapters are active")
        if active and not module._did_swap_in_out_features:
            raise Uncovered("weights are stored with the inputs first")
        for name in active:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            found[module.parameter_name] = Factors(a, b, float(module.scaling[name]))
        module = module.base_layer
    return module, found
