"""The MLP in tiles of rows, so that nothing of the size `[tokens, intermediate]` is whole in memory unless it is kept.

Rows of an MLP do not know of each other: a tile's rows are those of the whole. Only the gradients of what is trained
are sums over all rows; they are added up in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ftcore_kernels.layers.decoder import middle, mlp
from ftcore_kernels.layers.decoder.dense import Dense
from ftcore_kernels.layers.decoder.gradients import Gradients, Sums
from ftcore_kernels.layers.decoder.keep import Keep
from ftcore_kernels.layers.decoder.parts import Kept, Layer

BYTES = 2**27
"""Of a tile of the gate-and-up product. With the activation and its gradient a tile takes about 200 MiB, which is less
than what attention or the head need at other times, so smaller ones would free nothing."""

FEWEST = 2048
"""Rows of a tile at least: a product with fewer leaves processors of a large GPU without work."""

MULTIPLE = 256
"""Rows of a tile come in multiples of this, the height of the largest blocks of matrix products."""


def rows_of_a_tile(tokens: int, width: int) -> int:
    """Rows of each tile but the last, for a gate-and-up product of so many 16-bit columns; 0 if two do not fill."""
    least = max(BYTES // (2 * width) // MULTIPLE * MULTIPLE, FEWEST)
    number = tokens // least
    if number < 2:
        return 0
    return -(-tokens // (number * MULTIPLE)) * MULTIPLE  # all alike


def forward(layer: Layer, kept: Kept, normed: torch.Tensor | None, dense: Dense, keep: Keep) -> torch.Tensor:
    """The layer's output `[M, H]`; of the MLP, only what `keep` keeps is left in `kept`.

    :param normed: The MLP's input; None makes it tile by tile as well, and leaves nothing of the residual stream.
    """
    out, found = torch.empty_like(kept.x), Kept(None)
    everything = keep is Keep.ALL and normed is not None
    with dense.held(layer.out, layer.gate_up, layer.down):
        if everything:
            mlp.gate_up(layer, kept, normed, dense)
        for rows in of(layer.tile, out.shape[0]):
            part = kept.rows(rows)
            if not everything:
                entry = middle.forward(layer, part, dense) if normed is None else normed[rows]
                mlp.gate_up(layer, part, entry, dense)
                del entry
            mlp.lower(layer, part, mlp.activation(layer, part), dense, into=out[rows])
            part.gate_up = None
            found.down_xa = put(found.down_xa, part.down_xa, rows, out)
            if everything:
                found.lowered = put(found.lowered, part.lowered, rows, out)
                found.lowered_rstd = put(found.lowered_rstd, part.lowered_rstd, rows, out)
    # Not before: what a part finds there it takes for its own.
    kept.down_xa, kept.lowered, kept.lowered_rstd = found.down_xa, found.lowered, found.lowered_rstd
    return out


def backward(
    layer: Layer, kept: Kept, dout: torch.Tensor, grads: Gradients, dense: Dense, into: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the residual stream before the MLP, `[M, H]`; what was not kept is computed again.

    :param into: Memory for the result; may be `dout`.
    """
    dmiddle, sums = torch.empty_like(dout) if into is None else into, Sums()
    with dense.held(layer.gate_up, layer.down):
        for rows in of(layer.tile, dout.shape[0]):
            part = kept.rows(rows)
            mlp.complete(layer, part, dense)
            mlp.backward(layer, part, dout[rows], sums, dense, into=dmiddle[rows])
    kept.gate_up = kept.lowered = None
    sums.hand_over(grads)
    return dmiddle


def of(tile: int, number: int) -> Iterator[slice]:
    """So many rows in tiles; in one if `tile` is 0."""
    tile = tile or max(number, 1)
    return (slice(first, min(first + tile, number)) for first in range(0, number, tile))


def put(whole: torch.Tensor | None, part: torch.Tensor | None, rows: slice, like: torch.Tensor) -> torch.Tensor | None:
    """A tile's rows in their place in the whole, which is made for the first one."""
    if part is None:
        return None
    if whole is None:
        whole = part.new_empty((like.shape[0], *part.shape[1:]))
    whole[rows] = part
    return whole
