"""What a layer's backward leaves for its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

FEW = 2**20
"""Elements up to which gradients wait for each other, to be copied home in one launch."""


class Gradients:
    """Gradients by parameter, in memory of their own or in `homes`, which are shaped like the parameters."""

    def __init__(self, homes: Mapping[nn.Parameter, torch.Tensor] | None = None) -> None:
        self._found: dict[int, torch.Tensor] = {}
        self._homes = {id(parameter): home for parameter, home in (homes or {}).items()}
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __setitem__(self, parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        home = self._homes.get(id(parameter))
        if home is None:
            self._found[id(parameter)] = gradient.to(parameter.dtype)
            return
        self._found[id(parameter)] = home
        if gradient.numel() > FEW:
            home.copy_(gradient)
        else:
            self._waiting.append((home, gradient))

    def of(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor | None]:
        """In the order of `parameters`."""
        if self._waiting:
            homes, gradients = zip(*self._waiting, strict=True)
            torch._foreach_copy_(homes, gradients)
            self._waiting.clear()
        return [self._found.get(id(parameter)) for parameter in parameters]
