"""How much a layer keeps for its backward: what each choice costs in memory and in work done twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ftcore.specs import Level
from ftcore_kernels.layers.decoder.graphs import Graphs
from ftcore_kernels.layers.decoder.host import Host, busy_host, host_of
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.linear import border_for, padded_rank
from ftcore_kernels.layers.decoder.sources import is_nf4
from ftcore_kernels.layers.decoder.tiles import rows_of_a_tile

LAUNCH_BOUND = 2e12
"""Floating-point operations of a layer's forward below which launches are recorded.

On an H100 that is 4096 tokens of an 8B model. At twice as many, recording them gained nothing that could be measured.
"""

WORK_OF_A_BYTE = 30_000
"""Floating-point operations in the time that a byte takes to host memory: 600 TFLOP/s against 20 GB/s, while an H100
has 25 to 50 GB/s; slower GPUs have more time."""

IN_A_GROUP = 5 * 2**28
"""Bytes of the backward through attention of a group of heads: two key-value heads of an 8B model at 65,536 tokens."""

SAVED = 2**30
"""Bytes that groups have to save: they take a few launches more for each, and norms and projections once more."""


class Recompute:
    """Carried by every patched layer as `ftcore_recompute`; `memory` sets `choose`."""

    def __init__(self, groups: Sequence[Sequence[Any]], head_dim: int, sandwich: bool, head_norm: bool = False) -> None:
        self.choose: Callable[[int, int], int] | None = None
        self.may_record = True
        self.away = self.attended = False
        self.inside = False
        self.tiled = False
        self.width = 2
        self.graphs: Graphs | None = None
        bases = [[getattr(linear, "base_layer", linear) for linear in group] for group in groups]
        self._hidden, self._attended = int(bases[0][0].in_features), int(bases[1][0].in_features)
        self._qkv, self._gate_up = (sum(int(base.out_features) for base in bases[index]) for index in (0, 2))
        self._borders = border_for(groups[0]), border_for(groups[2])
        """Columns beside the query-key-value and the gate-and-up product."""
        self._heads = self._attended // head_dim
        self._sandwich, self._head_norm = sandwich, head_norm
        # With a border, the `x A^T` of the two wide products are columns of what is counted elsewhere.
        shrunk = [groups[1], groups[3]]
        shrunk += [group for group, border in zip((groups[0], groups[2]), self._borders, strict=True) if not border]
        self._numbers = 4 if sandwich else 2
        """Of each norm one in 32 bits: what every level keeps of a token besides the input and rows of `x A^T`."""
        self._shrunk = sum(len(group) * _rank(group) for group in shrunk)
        self._mlp = [*bases[2], *bases[3]]
        self._quantized = is_nf4(bases[0][0])
        """Whether the products' weights are dequantized for a while."""

    def follow(self, before: Recompute | None) -> None:
        """Record the launches of small batches, in a chain with the layer before this one."""
        self.graphs = Graphs(None if before is None else before.graphs)

    def forget(self) -> None:
        """Let go of recorded launches and what they hold, after memory was short."""
        if self.graphs is not None:
            self.graphs.forget()

    def recording(self, hidden: torch.Tensor) -> Graphs | None:
        """Where the launches of a batch `[B, S, H]` are recorded, if its kernels are short enough for that to pay."""
        return self.graphs if hidden.shape[0] * hidden.shape[1] < self.recorded else None

    @property
    def recorded(self) -> float:
        """Batches of fewer tokens have their launches recorded."""
        return LAUNCH_BOUND / self._products if self.graphs is not None and self.may_record else 0

    def keep(self, hidden: torch.Tensor) -> Keep:
        """What to keep of a forward pass over `[B, S, H]`."""
        if self.choose is None or not torch.is_grad_enabled():
            return Keep.ALL
        level = Keep(1 + self.choose(hidden.shape[0], hidden.shape[1]))
        return max(level, Keep.ATTENTION) if self.attended else level

    def host(self, hidden: torch.Tensor) -> Host | None:
        """Where inputs wait for the backward, if this layer's or those of layers before it are not on the GPU."""
        if not torch.is_grad_enabled():
            return None
        return host_of(hidden.device) if self.away or self.attended else busy_host(hidden.device)

    def input_bytes(self, rows: int, length: int) -> int:
        """Bytes of the input."""
        return self.width * rows * length * self._hidden

    def moved(self, rows: int, length: int) -> int:
        """Bytes of the input, where a copy is over before the layer is; 0 where it is not."""
        size = self.input_bytes(rows, length)
        return size if rows * length * self._products >= WORK_OF_A_BYTE * size else 0

    def attended_bytes(self, rows: int, length: int) -> tuple[int, int]:
        """Of attention's output and of what stays on the GPU beside it; zeros where copies take longer than a layer."""
        tokens = rows * length
        size = self.width * tokens * self._attended
        work = tokens * (self._products + 2 * length * self._attended)
        in_time = work >= WORK_OF_A_BYTE * (size + self.input_bytes(rows, length))
        return (size, 4 * tokens * self._heads) if in_time else (0, 0)

    @property
    def _products(self) -> float:
        """Floating-point operations of a token in the products of a forward."""
        return 2 * self._hidden * (self._qkv + self._attended + 1.5 * self._gate_up)

    def levels(self, rows: int, length: int) -> Sequence[Level]:
        """One for each member of :class:`Keep`, in its order."""
        tokens, width = rows * length, self.width
        attended = width * self._attended + 4 * self._heads
        qkv, gate_up = self._qkv + self._borders[0], self._gate_up + self._borders[1]
        least = width * (self._hidden + self._shrunk) + 4 * self._numbers
        widths = [least, attended, width * self._hidden, width * qkv, width * gate_up]
        if self._sandwich:
            widths[4] += 2 * width * self._hidden  # the inputs of the two norms after attention and MLP
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

    def tile(self, hidden: torch.Tensor) -> int:
        """Rows of a tile that the MLP of a batch `[B, S, H]` is computed in; 0 where it is computed whole."""
        tokens = hidden.shape[0] * hidden.shape[1]
        if not torch.is_grad_enabled():
            return rows_of_a_tile(tokens, self._mlp_width)  # nothing is kept: tiles cost nothing
        return self._tile(tokens) if self.tiled else 0

    def _tile(self, tokens: int) -> int:
        """In training: where it saves memory."""
        tile = rows_of_a_tile(tokens, self._mlp_width)
        return tile if tile and self._in_tiles(tokens, tile) < self._whole(tokens) else 0

    def group(self, hidden: torch.Tensor) -> int:
        """Key-value heads of a group that attention of a batch `[B, S, H]` is computed in; 0 where it is whole."""
        tokens = hidden.shape[0] * hidden.shape[1]
        return self._group(tokens, self._tile(tokens)) if self.tiled and torch.is_grad_enabled() else 0

    def _group(self, tokens: int, tile: int) -> int:
        """Where attention is long enough to hide the work that is done again, and it saves much memory."""
        group = max(IN_A_GROUP // (self.width * tokens * self._of_a_head), 1) if tile else self._kv_heads
        if group >= self._kv_heads:
            return 0
        return group if self._in_tiles(tokens, tile) - self._in_groups(tokens, tile, group) >= SAVED else 0

    @property
    def _kv_heads(self) -> int:
        return (self._qkv - self._attended) // (2 * self._attended // self._heads)

    @property
    def _of_a_head(self) -> int:
        """Columns of the backward through attention of a key-value head and its queries, besides all heads' output.

        Queries, keys and values three times: as the product left them, for a norm of heads, turned, and their
        gradients; the output's gradient; the sums of the queries' gradient in 32 bits; keys' and values' for each query
        head. The output of the group before is gone when there is a gradient of the normalised input.
        """
        return (3 * self._qkv + 4 * self._attended) // self._kv_heads

    @property
    def _mlp_width(self) -> int:
        return self._gate_up + self._borders[1]

    def workspace(self, rows: int, length: int, tiled: bool = False) -> int:
        """Bytes that one backward holds at its peak besides what was kept: counted from the steps."""
        tokens = rows * length
        tile = self._tile(tokens) if tiled else 0
        if group := self._group(tokens, tile):
            return self._in_groups(tokens, tile, group)
        return self._in_tiles(tokens, tile) if tile else self._whole(tokens)

    def _whole(self, tokens: int) -> int:
        mlp = self._gate_up + self._gate_up // 2 + self._turned + self._attended + 3 * self._hidden
        weights = (self._gate_up + self._qkv) * self._hidden if self._quantized else 0
        return self.width * (tokens * max(mlp, self._attention) + weights)

    def _in_tiles(self, tokens: int, tile: int) -> int:
        """The same with the MLP in tiles, whose weights are dequantized for all of them at once."""
        of_a_tile = self._gate_up + self._gate_up // 2 + 3 * self._hidden
        beside = self._turned + self._attended + (4 if self._sandwich else 3) * self._hidden
        weights = 3 * self._gate_up // 2 * self._hidden
        mlp = self.width * (tile * of_a_tile + tokens * beside)
        if any(base.weight.requires_grad for base in self._mlp):
            mlp += (4 + self.width) * weights  # their gradients: sums in 32 bits, and a tile's part
        if self._quantized:
            mlp += self.width * weights
        held = (self._qkv + self._attended) * self._hidden if self._quantized else 0
        return max(mlp, self.width * tokens * self._attention) + self.width * held

    def _in_groups(self, tokens: int, tile: int, group: int) -> int:
        """The same with attention in groups of heads: see `heads.backward`. The incoming gradient is written over."""
        sandwich = int(self._sandwich) * self._hidden
        of_a_tile = self._gate_up + self._gate_up // 2 + 6 * self._hidden + self._attended
        gradients = self._attended + self._hidden + sandwich
        mlp = (3 * self._gate_up // 2 + self._attended) * self._hidden
        behind = self.width * (tile * of_a_tile + tokens * gradients + (mlp if self._quantized else 0))
        if any(base.weight.requires_grad for base in self._mlp):
            behind += (4 + self.width) * mlp
        held = (self._qkv + self._attended) * self._hidden if self._quantized else 0
        columns = gradients + self._hidden + group * self._of_a_head + 3 * self._borders[0]
        return max(behind, self.width * (tokens * columns + held))

    @property
    def _turned(self) -> int:
        """Columns of queries, keys and values; for a norm of heads they are there as the product left them, too."""
        return (2 if self._head_norm else 1) * self._qkv

    @property
    def _attention(self) -> int:
        """Columns of the backward through attention.

        Besides tensors that the layer sees, kernels take the sums of the queries' gradient in 32 bits, and where heads
        share keys and values, gradients of those for each query head.
        """
        kernel = 4 if self._kv_heads < self._heads else 2
        return self._turned + self._qkv + (2 + kernel) * self._attended + (3 if self._sandwich else 2) * self._hidden


def _rank(group: Sequence[Any]) -> int:
    """The rank that the kernels compute a product's LoRA with."""
    return padded_rank([rank for module in group for rank in getattr(module, "r", {}).values()])
