"""Things that take their time: steps, and functions such as rewards."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ftcore.hooks import hookimpl

if TYPE_CHECKING:
    from transformers import TrainerCallback

P = ParamSpec("P")
R = TypeVar("R")


def slowly(function: Callable[P, R], seconds: float, calls: frozenset[int] | None = None) -> Callable[P, R]:
    """The function, after a wait of so many seconds.

    :param calls: Which calls wait, the first being 0; None is all of them.
    """
    number = 0

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal number
        if calls is None or number in calls:
            time.sleep(seconds)
        number += 1
        return function(*args, **kwargs)

    return called


class SlowSteps:
    """A plugin that waits in training steps: `run(words, plugins=[SlowSteps(0.5)])`.

    :param steps: Which steps wait, the first being 1; None is all of them.
    """

    def __init__(self, seconds: float, steps: frozenset[int] | None = None) -> None:
        self._seconds, self._steps = seconds, steps

    @hookimpl
    def ftcore_callbacks(self) -> list[TrainerCallback]:
        """The callback that waits."""
        from transformers import TrainerCallback

        seconds, steps = self._seconds, self._steps

        class Waits(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if steps is None or state.global_step + 1 in steps:
                    time.sleep(seconds)

        return [Waits()]
