"""The Hydra that ftcore uses: a config source over entry points, a search path for packages' YAML, `compose`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ftcore import config_guard, foreign_yaml, words
from ftcore.catalog import installed
from ftcore.config import KINDS, MANY, RunConfig
from ftcore.errors import Exit, Problem, Refused, refuse
from ftcore.explanations import explain, explain_grammar
from ftcore.overrides import GROUPS, check_overrides
from ftcore.redaction import redact
from ftcore.validate import reject_unknown_keys

CONF_MODULE = "ftcore_conf"
CONFIG_NAME = "ftcore"
RECORD = "config.yaml"
"""File in a run folder that holds its whole config."""
SHORT = re.compile(r"^(\+{0,2})resume=")
"""`resume=last` is written for `resume.checkpoint=last`."""
NEW_EACH_TIME = ("output_dir", "run", "resume")
"""Recorded keys that `run=FOLDER` does not take over: a finished run is never written over."""


class EntryPointSource(ConfigSource):
    """`ftcore://`: every installed plugin is a config of the group named after its kind."""

    @staticmethod
    def scheme() -> str:
        """URL scheme of this source."""
        return "ftcore"

    def available(self) -> bool:
        """The catalog is always there."""
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        """The selected plugin's Config; here, and only here, a selected plugin is imported for composing."""
        kind, _, name = config_path.removesuffix(".yaml").rpartition("/")
        package = kind
        if not kind:
            config = OmegaConf.structured(RunConfig)
        else:
            option = installed().find(kind, name)
            config = OmegaConf.structured(option.config_class()(name=name))
            if kind in MANY:
                package = f"{kind}.{option.name}"
            selects = getattr(option.load(), "SELECTS", {})
            if selects:
                with open_dict(config):
                    config["defaults"] = [{f"override /{k}@_global_.{k}": v} for k, v in selects.items()]
        return ConfigResult(
            provider=self.provider,
            path=f"{self.scheme()}://{config_path}",
            config=config,
            header={"package": package or "_global_"},
        )

    def is_group(self, config_path: str) -> bool:
        """Kinds are groups."""
        return config_path.strip("/") in KINDS

    def is_config(self, config_path: str) -> bool:
        """Options are configs; so is the schema of the whole run."""
        kind, _, name = config_path.removesuffix(".yaml").rpartition("/")
        if not kind:
            return name == "run_schema"
        return kind in KINDS and name.rpartition(":")[2] in installed().names(kind)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Option names of a kind."""
        if results_filter == ObjectType.GROUP:
            return [] if config_path else list(KINDS)
        return installed().names(config_path.strip("/")) if config_path else ["run_schema"]


class PackagesSearchPath(SearchPathPlugin):
    """Adds the installed plugins, and the YAML that installed packages bring, to ftcore's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Acts on ftcore's own search path only, so that other Hydra apps in the process see no difference."""
        if not any(element.path == f"pkg://{CONF_MODULE}" for element in search_path.get_path()):
            return
        search_path.append("ftcore", "ftcore://")
        for name, package in installed().conf.items():
            if package != CONF_MODULE:
                search_path.append(name, f"pkg://{package}")


def register() -> None:
    """Make both known to Hydra. Repeated calls change nothing."""
    # Not through the `hydra_plugins` namespace: that would alter every Hydra app of the environment.
    Plugins.instance().register(EntryPointSource)
    Plugins.instance().register(PackagesSearchPath)


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides with Hydra's grammar.

    Raises Refused for what is no list of words, with the quoted form for text that Hydra's grammar does not take, and
    for what no setting may hold.
    """
    overrides = words.checked(overrides)
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        text = SHORT.sub(r"\1resume.checkpoint=", text)
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            raise explain_grammar(text, error) from error
    config_guard.check_overrides(parsed)
    return parsed


def compose(overrides: Sequence[str] = (), config_dir: str | None = None) -> DictConfig:
    """Compose the config of a run from Hydra overrides.

    `run=PATH` takes the config recorded in that run folder as the base instead of the defaults.
    Raises Refused for anything that is unknown, misspelt or of the wrong type.
    """
    parsed = parse(overrides)
    refuse([_of_sweeps(override) for override in parsed if of_hydra(override)])
    check_overrides(parsed, installed(), recorded=_recorded(parsed) is not None)
    if config_dir or any(str(override.key_or_group) in GROUPS for override in parsed):
        foreign_yaml.check(config_dir)
    try:
        if record := _recorded(parsed):
            config = _from_record(record, parsed)
        else:
            config = _from_hydra(hydra_overrides(parsed), config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error
    except (YAMLError, RecursionError) as error:
        raise Refused(
            Problem("config", f"a YAML file cannot be read: {_one_line(error)}", "mend the file", Exit.DATA)
        ) from error
    except (AssertionError, ValueError) as error:  # OmegaConf's way of saying that a key lies below nothing
        raise _below_nothing(parsed, error) from error
    config_guard.check_values(config)
    reject_unknown_keys(config)
    return config


def hydra_overrides(parsed: Sequence[Override]) -> list[str]:
    """The overrides as Hydra gets them.

    Plain keys become `++key=value`, so that a misspelt key reaches ftcore's own check, which names all of them at
    once and never advises adding a dead key with `+`.
    """
    swept = {override.key_or_group for override in parsed if _is_group(override) and override.is_sweep_override()}
    texts = []
    for override in parsed:
        text = str(override.input_line)
        is_key = not _is_group(override) and override.type in (OverrideType.CHANGE, OverrideType.ADD)
        if is_key and not text.startswith("hydra"):
            key, _, value = text.lstrip("+").partition("=")
            # A sweep's first composition leaves out what is swept, so a key below it must be left out as well.
            below = {key.partition(".")[0], "recipe", "sweep"}  # a recipe may select anything
            one_of_one = bool(below & swept) and not override.is_sweep_override()
            text = f"++{key}=choice({value})" if one_of_one else f"++{key}={value}"
        texts.append(text)
    return texts


def of_hydra(override: Override) -> bool:
    """Whether a key is Hydra's own, which only its own application reads."""
    return re.split(r"[./]", str(override.key_or_group))[0] == "hydra"


def _of_sweeps(override: Override) -> Problem:
    key = str(override.key_or_group)
    fix = f"write output_dir={str(override.input_line).partition('=')[2]}" if key == "hydra.run.dir" else "leave it out"
    return Problem(key, "is for sweeps, which -m makes; nothing else reads it", fix)


def _from_hydra(overrides: list[str], config_dir: str | None) -> DictConfig:
    register()
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise Refused(Problem("--config-dir", f"there is no folder {config_dir}", code=Exit.MISSING_INPUT))
        overrides = [*overrides, f"hydra.searchpath=['file://{Path(config_dir).resolve().as_posix()}']"]
    # The context manager saves and restores Hydra's global state, so a Hydra app may call ftcore.
    with initialize_config_module(CONF_MODULE, version_base="1.3", job_name="ftcore"):
        return hydra_compose(CONFIG_NAME, overrides)


def _below_nothing(parsed: Sequence[Override], error: Exception) -> Refused:
    given = {o.key_or_group for o in parsed if _is_group(o)}
    below = [o for o in parsed if not _is_group(o) and "." in o.key_or_group]
    key = next((o.key_or_group for o in below if o.key_or_group.partition(".")[0] not in given), "config")
    kind = key.partition(".")[0]
    fix = f"select an option of {kind} first; `ftcore plugins {kind}` lists them" if kind in KINDS else ""
    return Refused(Problem(key, f"cannot be set here: {_one_line(error)}", fix))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _recorded(parsed: Sequence[Override]) -> Path | None:
    if any(o.key_or_group == "run" and o.is_sweep_override() for o in parsed):
        raise Refused(Problem("run", "names several runs", "name one, in a command of its own"))
    runs = [str(o.value()) for o in parsed if o.key_or_group == "run" and o.value() is not None]
    if not runs:
        return None
    if not runs[-1]:
        raise Refused(Problem("run", "is empty", "name a run folder; `ftcore runs` lists them"))
    path = Path(runs[-1]) / RECORD
    if not path.is_file():
        inside = min(Path(runs[-1]).glob(f"*/{RECORD}"), default=None)
        fix = f"name one of the runs in it: run={inside.parent}" if inside else "`ftcore runs` lists the run folders"
        raise Refused(Problem("run", f"{runs[-1]} holds no {RECORD}", fix, Exit.MISSING_INPUT))
    return path


def _from_record(path: Path, parsed: Sequence[Override]) -> DictConfig:
    config = OmegaConf.structured(RunConfig)
    recorded = OmegaConf.load(path)
    config_guard.check_values(recorded)  # taking a value over resolves it
    try:
        if not isinstance(recorded, DictConfig) or not recorded:
            raise TypeError("it holds no settings")
        _fill(config, recorded)
    except (AttributeError, TypeError, KeyError) as error:
        fix = "the run folder is damaged, or none; `ftcore runs` lists the run folders"
        raise Refused(Problem(str(path), f"is no config of a run: {_one_line(error)}", fix, Exit.DATA)) from error
    OmegaConf.set_struct(config, False)
    for override in sorted(parsed, key=lambda one: not _is_group(one)):  # as in Hydra, options come before their keys
        key, value = override.key_or_group, override.value()
        if _is_group(override) and key in MANY:
            config[key] = {_plain(str(name)): _option(key, str(name)) for name in _names(value)}
        elif _is_group(override):
            config[key] = _option(key, str(value))
        else:
            OmegaConf.update(config, key, value, force_add=True)
    return config


def _fill(config: DictConfig, recorded: DictConfig) -> None:
    for key in recorded:
        value = recorded[key]
        if key in MANY:
            config[key] = {n: OmegaConf.merge(_option(str(key), str(v.name or n)), v) for n, v in value.items()}
        elif key in KINDS and value is not None:
            config[key] = OmegaConf.merge(_option(str(key), str(value.name)), value)
        elif key not in KINDS and key not in NEW_EACH_TIME:
            OmegaConf.update(config, str(key), value)


def _option(kind: str, name: str) -> Any:
    return OmegaConf.structured(installed().find(kind, name).config_class()(name=name))


def _names(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _plain(name: str) -> str:
    return name.rpartition(":")[2]


def _is_group(override: Override) -> bool:
    return override.key_or_group.partition("@")[0] in {*KINDS, "recipe", "sweep"} or "/" in override.key_or_group


def typed(config: DictConfig) -> RunConfig:
    """The composed config as plain dataclasses.

    Raises Refused for a value that is missing or of the wrong type.
    """
    try:
        run = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise explain(error, ()) from error
    assert isinstance(run, RunConfig)
    refuse(list(_empty_paths(run)))
    return run


def _empty_paths(run: RunConfig) -> Iterator[Problem]:
    """Paths without a word, as a shell's unset variable leaves them: not the same as no path, which takes a default."""
    given = {"output_dir": run.output_dir}
    given |= {f"{kind}.path": getattr(getattr(run, kind), "path", None) for kind in ("data", "model", "adapter")}
    given |= {"data.eval_path": getattr(run.data, "eval_path", None)}
    for key, value in given.items():
        if value == "" or (isinstance(value, list) and "" in value):
            yield Problem(key, "is empty", f"name a file or a folder, or leave {key} out", Exit.MISSING_INPUT)


def record(run: RunConfig, folder: Path) -> None:
    """Write the whole config into a run folder, so that `run=FOLDER` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = folder / f"{RECORD}.tmp"
    whole.write_text(redact(to_yaml(run)), encoding="utf-8")
    whole.replace(folder / RECORD)


def to_yaml(run: RunConfig) -> str:
    """The config as YAML."""
    text: str = OmegaConf.to_yaml(OmegaConf.structured(run))
    return text
