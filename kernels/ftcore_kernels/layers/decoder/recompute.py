"""How much a layer keeps for its backward: what each choice costs in memory and in work done twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ftcore.specs import Level
from ftcore_kernels.layers.decoder.graphs import Graphs
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.linear import is_nf4

LAUNCH_BOUND = 2e12
"""Floating-point operations of a layer's forward below which launches are recorded.

On an H100 that is 4096 tokens of an 8B model. At twice as many, recording them gained nothing that could be measured.
"""


class Recompute:
    """Carried by every patched layer as `ftcore_recompute`; `memory` sets `choose`."""

    def __init__(self, groups: Sequence[Sequence[Any]], head_dim: int, sandwich: bool) -> None:
        self.choose: Callable[[int, int], int] | None = None
        self.may_record = True
        self.graphs: Graphs | None = None
        bases = [[getattr(linear, "base_layer", linear) for linear in group] for group in groups]
        self._hidden, self._attended = bases[0][0].in_features, bases[1][0].in_features
        self._qkv, self._gate_up = (sum(base.out_features for base in bases[index]) for index in (0, 2))
        self._heads = self._attended // head_dim
        self._sandwich = sandwich
        self._quantized = is_nf4(bases[0][0])
        """Whether the products' weights are dequantized for a while."""

    def follow(self, before: Recompute | None) -> None:
        """Record the launches of small batches, in a chain with the layer before this one."""
        self.graphs = Graphs(None if before is None else before.graphs)

    def recording(self, hidden: torch.Tensor) -> Graphs | None:
        """Where the launches of a batch `[B, S, H]` are recorded, if its kernels are short enough for that to pay."""
        work = 2 * hidden.shape[0] * hidden.shape[1] * self._hidden * (self._qkv + self._attended + 1.5 * self._gate_up)
        return self.graphs if work < LAUNCH_BOUND and self.may_record else None

    def keep(self, hidden: torch.Tensor) -> Keep:
        """What to keep of a forward pass over `[B, S, H]`."""
        if self.choose is None or not torch.is_grad_enabled():
            return Keep.ALL
        return Keep(1 + self.choose(hidden.shape[0], hidden.shape[1]))

    def levels(self, rows: int, length: int) -> Sequence[Level]:
        """One for each member of :class:`Keep`, in its order, for 16-bit activations."""
        tokens = rows * length
        attended = 2 * self._attended + 4 * self._heads
        widths = [2 * self._hidden, attended, 2 * self._hidden, 2 * self._qkv, 2 * self._gate_up]
        if self._sandwich:
            widths[4] += 4 * self._hidden  # the inputs of the two norms after attention and MLP
        products = [
            2 * self._hidden * self._qkv,
            2 * self._attended * self._hidden,
            2 * self._hidden * self._gate_up,
        ]
        attention = 2 * length * self._attended
        down = self._hidden * self._gate_up if self._sandwich else 0
        again = [
            sum(products) + attention + down,
            sum(products) + down,
            products[0] + products[2] + down,
            products[2] + down,
            0,
        ]
        return [Level(tokens * sum(widths[: index + 1]), float(tokens * again[index])) for index in range(len(Keep))]

    def workspace(self, rows: int, length: int) -> int:
        """Bytes that one backward holds at its peak besides what was kept: counted from the steps."""
        mlp = self._gate_up + self._gate_up // 2 + self._qkv + self._attended + 3 * self._hidden
        attention = 3 * self._qkv + 2 * self._attended + 3 * self._hidden
        weights = (self._gate_up + self._qkv) * self._hidden if self._quantized else 0
        return 2 * (rows * length * max(mlp, attention) + weights)
