"""`ftcore train`, the default task: one run; or a sweep of them, which Hydra starts."""

from __future__ import annotations

from dataclasses import replace

from ftcore import pipeline
from ftcore.config import RunConfig
from ftcore.resuming import going_on
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


def started(config: RunConfig) -> RunConfig:
    """A recorded config that is trained again gets a new folder, but `resume=last` goes on in the one that it names."""
    if config.run is None:
        return config
    folder = config.run if config.resume.checkpoint == "last" and config.output_dir is None else config.output_dir
    return replace(config, run=None, output_dir=folder)
