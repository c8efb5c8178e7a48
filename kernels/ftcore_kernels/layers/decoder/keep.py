"""What a layer keeps for its backward pass: from its input alone to everything that is not cheap to make again."""

from __future__ import annotations

from enum import IntEnum


class Keep(IntEnum):
    """Each keeps what the one before it keeps, and more; the gradients are the same with all of them.

    None of them ever computes the down projection twice where the family's layer ends in a plain addition: nothing in
    the backward reads its output.
    """

    INPUT = 1
    """The layer's input: attention, and three of the four products, are computed again."""
    ATTENTION = 2
    """And the attention's output: no attention twice."""
    MIDDLE = 3
    """And the residual stream between attention and MLP: no output projection twice."""
    QKV = 4
    """And queries, keys and values: of the products only gate and up are computed twice."""
    ALL = 5
    """And gate and up: no product twice."""
