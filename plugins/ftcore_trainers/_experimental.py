"""TRL's experimental trainers, imported without the notice that they are such: ftcore's own docs say it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def experimental() -> Iterator[None]:
    """What is imported inside may come from `trl.experimental`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        yield
