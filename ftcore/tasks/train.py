"""`ftcore train`, the default task: one run; or a sweep of them, which Hydra starts."""

from __future__ import annotations

from ftcore import pipeline
from ftcore.resuming import going_on, started
from ftcore.tasks._config import config_of, split_config_dir


def main(argv: list[str]) -> int:
    """A single run is composed here; words that only Hydra's own application knows (`-m`, `--cfg`, ...) go to Hydra."""
    _, words = split_config_dir(argv)
    if any(word.startswith("-") for word in words):
        from ftcore.tasks._sweep import through_hydra

        through_hydra(argv)
    else:
        pipeline.run(going_on(started(config_of(argv))))
    return 0
