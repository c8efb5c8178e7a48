"""Runs that Hydra's own application starts: sweeps (`-m`), and its looks at a config (`--cfg job`)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ftcore import config_guard, foreign_yaml, pipeline
from ftcore.catalog import installed
from ftcore.composition import CONF_MODULE, CONFIG_NAME, compose, hydra_overrides, of_hydra, parse, register, typed
from ftcore.errors import Problem, Refused
from ftcore.explanations import explain
from ftcore.overrides import check_overrides
from ftcore.tasks._config import split_config_dir
from ftcore.validate import reject_unknown_keys

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

FLAGS = {"-m", "--multirun", "--resolve", "--hydra-help"}
VALUED = {"--cfg", "-c", "--package", "-p", "--info", "-i"}
CHECKED = 64
"""Swept values that are composed beforehand; a longer sweep is checked as it goes."""

PLANNED = 16
"""Those of them that are planned as well, which may read all rows."""


def through_hydra(argv: Sequence[str]) -> None:
    """Hand the words over to Hydra, once every swept value is known to compose.

    Raises Refused for anything unknown, misspelt or of the wrong type, before a folder is made.
    """
    folder, words = split_config_dir(list(argv))
    flags, words = split_flags(words)
    parsed = parse(words)
    foreign_yaml.check(folder)
    if any(override.key_or_group == "run" for override in parsed):
        fix = f"leave out {flags[0]}, or write the settings without run="
        raise Refused(Problem("run", f"names a recorded run, which {flags[0]} does not read", fix))
    check_overrides(parsed, installed(), recorded=False)
    swept = any(override.is_sweep_override() for override in parsed)
    for override in parsed:
        if override.key_or_group == "output_dir" and swept and not override.is_sweep_override():
            message = "all runs of a sweep would write into one folder"
            raise Refused(Problem("output_dir", message, "name the folder of the sweep: hydra.sweep.dir=FOLDER"))
    singles = single_runs(parsed)
    for single in islice(singles, CHECKED):
        typed(compose(single, folder))
    if swept and not any(override.is_range_sweep() or override.is_interval_sweep() for override in parsed):
        for single in islice(singles, PLANNED):
            _plan(single, singles[0], folder)
    register()
    before = sys.argv
    sys.argv = ["ftcore", *flags, *(["--config-dir", folder] if folder else []), *hydra_overrides(parsed)]
    try:
        hydra.main(config_path=f"pkg://{CONF_MODULE}", config_name=CONFIG_NAME, version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, words) from error
    finally:
        sys.argv = before


def _plan(single: list[str], first: list[str], folder: str | None) -> None:
    """Find now what would stop a run hours later. Raises Refused, which says in which run."""
    own = [word for word, usual in zip(single, first, strict=True) if word != usual]
    try:
        pipeline.prepare(typed(compose(single, folder)))
    except Refused as refused:
        where = f" (in the run with {', '.join(own)})" if own else ""
        raise Refused(*(replace(p, message=f"{p.message}{where}") for p in refused.problems)) from refused


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags, with their values, and the rest.

    Raises Refused for a flag that means nothing here.
    """
    flags, rest, remaining = [], [], iter(words)
    for word in remaining:
        name = word.partition("=")[0]
        if not word.startswith("-"):
            rest.append(word)
        elif name in FLAGS or (name in VALUED and "=" in word):
            flags.append(word)
        elif name in VALUED:
            flags += [word, next(remaining, "")]
        else:
            fix = "settings are written key=value; -m makes a sweep"
            raise Refused(Problem(word, "is no option of ftcore", fix))
    names = {flag.partition("=")[0] for flag in flags}
    if (alone := names & {"--resolve", "--package", "-p"}) and not names & {"--cfg", "-c"}:
        raise Refused(Problem(min(alone), "is about a config that is shown", "add --cfg job, or leave it out"))
    return flags, rest


def single_runs(parsed: Sequence[Override]) -> list[list[str]]:
    """Each swept value once, with the first value of every other sweep; without what is Hydra's own."""
    values = [_values(override) for override in parsed if not of_hydra(override)]
    firsts = [options[0] for options in values]
    others = [(i, option) for i, options in enumerate(values) for option in options[1:]]
    return [firsts, *([*firsts[:i], option, *firsts[i + 1 :]] for i, option in others)]


def _values(override: Override) -> list[str]:
    text = str(override.input_line)
    if not override.is_sweep_override() or override.is_range_sweep() or override.is_interval_sweep():
        return [text] if not override.is_sweep_override() else [f"{text.partition('=')[0]}=1"]
    return [f"{text.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]


def job(config: Any) -> float | None:
    """One job of a sweep: a run in the job's folder. Returns the objective, which optimizing sweepers read."""
    config_guard.check_values(config)
    reject_unknown_keys(config)
    run = typed(config)
    if run.output_dir is None:
        run = replace(run, output_dir=HydraConfig.get().runtime.output_dir)
    objective = pipeline.run(run).metrics.get(run.objective)
    free_memory()
    return objective


def free_memory() -> None:
    """Let go of a finished run's model before the next job of the sweep starts in this process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
