"""The hooks that close a run's trackers; each tracker's module has them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

from ftcore import hookimpl

if TYPE_CHECKING:
    from transformers import Trainer

    from ftcore.specs import TrainReport


@hookimpl(wrapper=True)
def ftcore_train(trainer: Trainer) -> Generator[None, TrainReport, TrainReport]:
    """A run that fails, or is stopped, has logged all that it is going to."""
    from ftcore_extras._tracker import close

    try:
        return (yield)
    except BaseException:
        close(trainer)
        raise


@hookimpl(wrapper=True)
def ftcore_evaluate(trainer: Trainer) -> Generator[None, Mapping[str, float], Mapping[str, float]]:
    """The last thing that is logged; then the run is closed."""
    from ftcore_extras._tracker import close

    metrics = yield
    close(trainer)
    return metrics
