"""ftcore from Python: `run` for a whole run, `load` and `export` for a notebook or a training loop of your own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ftcore import pipeline, words
from ftcore.composition import compose, parse, typed
from ftcore.config import RunConfig
from ftcore.errors import Problem, Refused, refuse
from ftcore.resuming import started
from ftcore.specs import Artifact, Loaded, RunResult
from ftcore.validate import reject_unknown_keys

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_LOADED = "_ftcore_loaded"
"""Attribute of a model from `load`, so that `export` knows where it came from."""


def run(config: RunConfig | DictConfig | Sequence[str], plugins: Sequence[object] = ()) -> RunResult:
    """Run the pipeline: `ftcore.run(["+model=smollm2", "+trainer=sft"])`.

    `config` is a list of overrides as on the command line, or a composed config. `plugins` are modules, objects, or
    single functions marked with `hookimpl`; they win over the selected plugins. Raises Refused, PluginConflict or
    PluginError before any weight is read when something is wrong.
    """
    return pipeline.run(started(validated(config)), plugins)


def load(
    config: RunConfig | DictConfig | Sequence[str], plugins: Sequence[object] = ()
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A quantized, patched and adapted model with its tokenizer, for TRL's trainers or a loop of your own.

    Raises what :func:`run` raises.
    """
    hooks, plan = pipeline.prepare(validated(config), plugins)
    loaded = pipeline.load(hooks, plan)
    object.__setattr__(loaded.model, _LOADED, loaded)
    return loaded.model, loaded.tokenizer


def export(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    overrides: Sequence[str],
    output_dir: str | Path = "export",
    plugins: Sequence[object] = (),
) -> list[Artifact]:
    """Run exporters on a model from :func:`load`: `ftcore.export(model, tokenizer, ["+export=[safetensors]"])`.

    Artifacts are written under `output_dir`. Raises Refused for a model that did not come from :func:`load`, for words
    about anything but exporters, and what :func:`run` raises.
    """
    loaded: Loaded | None = getattr(model, _LOADED, None)
    if loaded is None:
        raise Refused(Problem("model", "this model did not come from ftcore.load", "load it with ftcore.load([...])"))
    assert loaded.plan.run.model is not None
    # Only the exporters and their settings come from the overrides; the rest is how the model was loaded.
    refuse([*_of_no_exporter(overrides)])
    asked = typed(compose([f"+model={loaded.plan.run.model.name}", *overrides]))
    config = replace(loaded.plan.run, export=asked.export, trainer=None, data=None, output_dir=str(output_dir))
    if not config.export:
        raise Refused(Problem("export", "no exporter is selected", "add +export=[safetensors]"))
    hooks, plan = pipeline.prepare(config, plugins)
    return pipeline.export(hooks, Loaded(plan=plan, model=model, tokenizer=tokenizer, patches=loaded.patches))


def _of_no_exporter(overrides: Sequence[str]) -> Iterator[Problem]:
    """Words that would change nothing."""
    for override in parse(words.checked(overrides, "overrides")):
        key = str(override.key_or_group)
        root = key.partition(".")[0]
        if root == "output_dir":
            yield Problem(key, "is no setting of an exporter", "give output_dir='FOLDER' as an argument")
        elif root == "plugins":
            yield Problem(key, "is no setting of an exporter", "give plugins=[...] as an argument")
        elif root != "export":
            yield Problem(key, "is no setting of an exporter", "give it to ftcore.load, which made the model")


def validated(config: RunConfig | DictConfig | Sequence[str]) -> RunConfig:
    """Overrides or a composed config as a typed RunConfig. Raises Refused for unknown keys and wrong values."""
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, DictConfig):
        reject_unknown_keys(config)
        return typed(config)
    return typed(compose(config))
