"""Checks of the recordings that rows name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ftcore import Plan, Problem, Refused
from ftcore.audio import length
from ftcore.errors import Exit
from ftcore_trainers._local_rows import converted

TooLong = Callable[[float], str | None]
"""From seconds to why a recording of so many is too long, or None."""


def unfit_rows(plan: Plan, rate: int, too_long: TooLong) -> Iterator[Problem]:
    """The first recording of the local rows that cannot be read, or does not fit the model."""
    for place, row in converted(plan):
        try:
            found, lasts = length(row["audio"])
        except Refused as refused:
            yield from (replace(problem, key=place) for problem in refused.problems)
            return
        if problem := unfit(place, found, lasts, rate, too_long):
            yield problem
            return


def unfit(place: str, found: int, lasts: float, rate: int, too_long: TooLong) -> Problem | None:
    """Why a recording of `found` samples a second and `lasts` seconds does not fit a model that takes `rate`."""
    if found != rate:
        message = f"the recording has {found} samples a second, and the model takes {rate}"
        return Problem(place, message, f"convert them: ffmpeg -i IN -ar {rate} -ac 1 OUT.wav", Exit.DATA)
    if reason := too_long(lasts):
        message = f"the recording lasts {lasts:.1f} s, {reason}"
        return Problem(place, message, "cut it, and its words with it, into shorter ones", Exit.DATA)
    return Problem(place, "the recording is empty", "take the row out", Exit.DATA) if lasts == 0 else None
