"""The hook that closes a run's trackers; each tracker's module has it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING

from ftcore import hookimpl

if TYPE_CHECKING:
    from transformers import Trainer


@hookimpl(wrapper=True)
def ftcore_evaluate(trainer: Trainer) -> Generator[None, Mapping[str, float], Mapping[str, float]]:
    """The last thing that is logged; then the run is closed."""
    from ftcore_extras._tracker import close

    metrics = yield
    close(trainer)
    return metrics
