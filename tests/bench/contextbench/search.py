"""The longest row that fits, by trial."""

from __future__ import annotations

from collections.abc import Callable

STEP = 256
"""Tokens that lengths are a multiple of."""
PART = 0.03
"""How much longer or shorter the next trial is."""


def longest(start: int, fits: Callable[[int], bool | None], tries: int) -> int:
    """Tokens of the longest row that was seen to fit; 0 where none was.

    From `start` up while it fits, or down until it does.

    :param fits: One trial; None where it says nothing, which ends the search.
    :param tries: Trials after the first.
    """
    length, best, short = rounded(start), 0, False
    for _ in range(tries + 1):
        found = fits(length)
        if found:
            best = max(best, length)
        else:
            short = True
        if found is None or (best and short):
            break
        length = rounded(length * (1 + PART if found else 1 - PART), up=bool(found))
    return best


def rounded(tokens: float, up: bool = False) -> int:
    """A multiple of `STEP`, at least one."""
    count = -(-tokens // STEP) if up else tokens // STEP
    return STEP * max(1, int(count))
