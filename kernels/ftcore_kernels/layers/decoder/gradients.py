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


class Sums(Gradients):
    """Gradients that come in parts: added up in fp32 (fp64 for fp64), and rounded once, when they are handed over.

    What a part brings in fp32 is taken over and added to: nobody else may hold it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}

    def __setitem__(self, parameter: nn.Parameter, gradient: torch.Tensor | None) -> None:
        if gradient is None:
            return
        if (found := self._sums.get(id(parameter))) is not None:
            found[1].add_(gradient)
        else:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._sums[id(parameter)] = parameter, gradient.to(wide)

    def hand_over(self, grads: Gradients) -> None:
        """Leave the sums in `grads`, each let go of as soon as it is there."""
        while self._sums:
            _, (parameter, total) = self._sums.popitem()
            grads[parameter] = total
