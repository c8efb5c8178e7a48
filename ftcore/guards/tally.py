"""When steps that are not finite are too many."""

from __future__ import annotations

from collections import deque

IN_A_ROW = 3
WINDOW = 100
ALLOWED = 1
"""Of the last `WINDOW` steps, once so many were made: 1 %."""


class Tally:
    """Counts the steps of a run."""

    def __init__(self) -> None:
        self._last: deque[bool] = deque(maxlen=WINDOW)
        self.in_a_row = 0
        self.skipped = 0
        """Steps so far that were not finite."""

    def add(self, bad: bool) -> str:
        """Count a step, and say why the run should stop; empty while it should not."""
        self._last.append(bad)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        self.skipped += bad
        if not bad:
            return ""
        if self.in_a_row >= IN_A_ROW:
            return f"{self.in_a_row} steps in a row were not finite"
        if len(self._last) == WINDOW and sum(self._last) > ALLOWED:
            return f"{sum(self._last)} of the last {WINDOW} steps were not finite"
        return ""
