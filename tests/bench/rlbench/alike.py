"""Whether two ways of writing completions are learnt from alike."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

LAST, WINDOW = 40, 10
"""Steps at the end that are compared, and those of a window among them."""

Curve = list[float]


def difference(one: Sequence[Curve], other: Sequence[Curve]) -> tuple[float, float]:
    """How far the mean rewards of the last steps are apart, and how far chance alone puts them.

    Chance: the largest distance between two windows of one run's last steps, or between two seeds of one side.

    :param one: A side's rewards by step, a curve for each seed; all curves have as many steps.
    """
    means = [[statistics.mean(curve[-LAST:]) for curve in side] for side in (one, other)]
    chance = max(map(spread, means))
    for curve in (*one, *other):
        last = curve[-LAST:]
        windows = [statistics.mean(last[i : i + WINDOW]) for i in range(0, len(last) - WINDOW + 1, WINDOW)]
        chance = max(chance, spread(windows or last))
    return abs(statistics.mean(means[0]) - statistics.mean(means[1])), chance


def spread(values: Sequence[float]) -> float:
    """Between the largest and the smallest."""
    return max(values) - min(values)


def windows(curve: Curve, size: int) -> Curve:
    """Means of the windows one after the other; the last may be short."""
    return [statistics.mean(curve[i : i + size]) for i in range(0, len(curve), size)]
