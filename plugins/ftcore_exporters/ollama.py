"""A folder for Ollama: the GGUF file and a Modelfile with the model's own chat format."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from ftcore import Artifact, Checkpoint, Plan, Problem, hookimpl
from ftcore.catalog import nearest
from ftcore.config import ReadBackConfig

REQUIRES = ("gguf>=0.18", "libgguf>=0.2.2")
NAME = re.compile(r"([A-Za-z0-9][\w-]*/)?[A-Za-z0-9_](\.?[\w-])*(:[A-Za-z0-9_](\.?[\w-])*)?", re.ASCII)
"""`[namespace/]model[:tag]`, as Ollama's `types/model/name.go` takes it."""


@dataclass
class Config(ReadBackConfig):
    """The Ollama export's settings."""

    type: str = "q8_0"
    """Type of the GGUF file, one of those of the gguf export."""
    system: str | None = None
    """System prompt of the Modelfile; null takes `sampling.system`."""
    num_ctx: int | None = None
    """Context in tokens; null takes `trainer.max_length`, but no less than 4096 and no more than the model's."""
    model_name: str | None = None
    """What the model is called in the printed `ollama create`; null takes the run folder's name."""
    license: str | None = None
    """Licence of the model, its text or its name; null takes the checkpoint's LICENSE file, where it has one."""


@hookimpl
def ftcore_check_plan(plan: Plan) -> list[Problem]:
    """A type that exists, a name that Ollama takes, a system prompt that a Modelfile can hold, and a GGUF family."""
    from ftcore_exporters._ollama.modelfile import unwritable
    from ftcore_exporters.gguf.checks import config_problems
    from ftcore_exporters.gguf.mixes import FILE_TYPES

    config, found = plan.config(Config), []
    if config.type not in FILE_TYPES:
        near = nearest(config.type.lower(), FILE_TYPES)
        fix = f"did you mean {near}?" if near else f"use one of {', '.join(FILE_TYPES)}"
        found.append(Problem("export.ollama.type", f"'{config.type}' is no type", fix))
    if config.model_name is not None and not NAME.fullmatch(config.model_name):
        fix = "letters, digits, '.', '_' and '-': my-model, me/my-model or my-model:q8"
        found.append(Problem("export.ollama.model_name", f"'{config.model_name}' is no name of a model", fix))
    if config.num_ctx is not None and config.num_ctx < 1:
        found.append(Problem("export.ollama.num_ctx", f"{config.num_ctx} tokens hold nothing", "leave it out"))
    for key, text in (("system", _system(plan)), ("license", config.license)):
        if text and (reason := unwritable(text)):
            own = key != "system" or config.system is not None
            where = f"export.ollama.{key}" if own else "sampling.system"
            found.append(Problem(where, reason, "take it out"))
    return [*found, *config_problems(plan, "export.ollama")]


@hookimpl
def ftcore_export(plan: Plan, checkpoint: Checkpoint) -> list[Artifact]:
    """`export/ollama` with one GGUF file and `Modelfile`."""
    from ftcore_exporters._ollama.export import write_folder

    config = plan.config(Config)
    target = plan.output_dir / "export" / "ollama"
    name = config.model_name or _named(plan)
    written = write_folder(checkpoint, target, config.type, _system(plan), config.num_ctx, config.license)
    checks: dict[str, Any] = {"template": written.template.whose, "modelfile": "not read by Ollama itself"}
    if config.verify:
        from ftcore.read_back import read_back_gguf
        from ftcore_exporters._ollama.prompts import prompt_checks

        file = target / written.file
        prompts = prompt_checks(file, written.template, checkpoint.tokenizer)
        checks |= {**read_back_gguf(checkpoint, file), **prompts}
    note = f"ollama create {name} -f {shlex.quote(str(target / 'Modelfile'))}"
    return [Artifact.of("ollama", target, note=note, checks=checks)]


def _system(plan: Plan) -> str | None:
    config = plan.config(Config)
    return config.system if config.system is not None else plan.run.sampling.system


def _named(plan: Plan) -> str:
    """The run folder's name in the characters that Ollama takes."""
    name = re.sub(r"\.{2,}", ".", re.sub(r"[^A-Za-z0-9_.-]+", "-", plan.output_dir.resolve().name)).strip(".-")
    return name.lower() or "ftcore"
