"""Command-line words to a typed config, for the tasks that compose one."""

from __future__ import annotations

from ftcore.composition import compose, typed
from ftcore.config import RunConfig
from ftcore.errors import Problem, Refused

CONFIG_DIR = ("--config-dir", "-cd")


def config_of(argv: list[str]) -> RunConfig:
    """Compose `key=value` words, with an optional `--config-dir FOLDER` of YAML of your own."""
    folder, words = split_config_dir(argv)
    return typed(compose(words, folder))


def split_config_dir(argv: list[str]) -> tuple[str | None, list[str]]:
    """Take `--config-dir FOLDER` out of the words.

    Raises Refused when the folder's name is missing.
    """
    folder, words, rest = None, [], iter(argv)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag not in CONFIG_DIR:
            words.append(word)
            continue
        folder = value if equals else next(rest, None)
        if not folder:
            raise Refused(Problem(flag, "needs a folder", f"{flag} my_conf"))
    return folder, words


def need_run(config: RunConfig, task: str, example: str) -> None:
    """Raises Refused when a task that works on a finished run was given none."""
    if config.run is None:
        raise Refused(Problem("run", f"`ftcore {task}` works on a finished run, and none is named", example))
