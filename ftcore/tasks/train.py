"""`ftcore train`, the default task: one run, or a sweep of them through Hydra."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ftcore import pipeline
from ftcore.compose import CONF_MODULE, CONFIG_NAME, hydra_overrides, parse, register, typed
from ftcore.config import RunConfig
from ftcore.errors import Problem, Refused
from ftcore.overrides import check_overrides
from ftcore.tasks._config import config_of, split_config_dir
from ftcore.validate import reject_unknown_keys


def main(argv: list[str]) -> int:
    """A single run is composed here; words that only Hydra's own application knows (`-m`, `--cfg`, ...) go to Hydra."""
    _, words = split_config_dir(argv)
    if any(word.startswith("-") for word in words):
        _through_hydra(argv)
    else:
        pipeline.run(_started(config_of(argv)))
    return 0


def _started(config: RunConfig) -> RunConfig:
    """A recorded config that is trained again writes into a new folder unless it is told where."""
    return replace(config, run=None) if config.run else config


def _through_hydra(argv: Sequence[str]) -> None:
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ftcore.catalog import installed
    from ftcore.overrides import explain

    folder, words = split_config_dir(list(argv))
    parsed = parse([word for word in words if not word.startswith("-")])
    check_overrides(parsed, installed(), recorded=False)
    register()
    flags = [word for word in words if word.startswith("-")]
    if unknown := [flag for flag in flags if flag.lstrip("-").partition("=")[0] not in _FLAGS]:
        raise Refused(Problem(unknown[0], "is no option of ftcore", "settings are written key=value; -m makes a sweep"))
    before = sys.argv
    sys.argv = ["ftcore", *flags, *(["--config-dir", folder] if folder else []), *hydra_overrides(parsed)]
    try:
        hydra.main(config_path=f"pkg://{CONF_MODULE}", config_name=CONFIG_NAME, version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, words) from error
    finally:
        sys.argv = before


_FLAGS = {"m", "multirun", "run", "r", "cfg", "c", "resolve", "package", "p", "info", "i", "hydra-help"}


def job(config: Any) -> float | None:
    """One job of a sweep: a run in the job's folder. Returns the objective, which optimizing sweepers read."""
    from hydra.core.hydra_config import HydraConfig

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
