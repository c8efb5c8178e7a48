"""A folder for a server: the merged model or the adapter, where answers end, and the command that starts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftcore import Artifact, Checkpoint, Plan, Problem, Refused
from ftcore.config import ReadBackConfig
from ftcore.paths import whole_folder
from ftcore.rope import scaling
from ftcore_exporters import _adapter_folder, _adapter_lint, _serving
from ftcore_exporters._merging import makes_up_for_rounding, not_writing, unmergeable

FORMS = ("merged", "adapter")
GUIDE = "SERVE.md"


@dataclass
class ServedConfig(ReadBackConfig):
    """Settings of both servers' exports."""

    form: str = "merged"
    """`merged`: one 16-bit model; `adapter`: the LoRA adapter alone, served over its base."""
    max_length: int | None = None
    """Longest context in tokens that the command asks for; null takes the model's own."""


@dataclass(frozen=True)
class Server:
    """How one server is started."""

    name: str
    """As in `export.<name>`."""
    title: str
    start: tuple[str, ...]
    """The command's first words; the model's folder or id follows."""
    served: str
    """Option for the name of the model."""
    context: str
    """Option for the longest context."""
    faults: Callable[[_adapter_lint.Lint], tuple[str, ...]]
    """Its part of a lint."""
    planned_faults: Callable[[Mapping[str, Any], Mapping[str, Any]], Iterator[str]]
    """Why it does not take an adapter of such a config and names."""
    adapter: Callable[[str, int | None], Mapping[str, object]]
    """Options that load the adapter of this folder, from its name and vLLM's rank for it."""
    ends: Mapping[str, object] = field(default_factory=dict)
    """Options that make it end answers by this folder's `generation_config.json`, over a base."""


def problems(plan: Plan, server: Server, config: ServedConfig) -> list[Problem]:
    """A form that there is, a model that writes text, and for an adapter what the server takes."""
    key = f"export.{server.name}"
    found = [*not_writing(plan, server.title)]
    if config.max_length is not None and config.max_length < 1:
        found.append(Problem(f"{key}.max_length", f"is {config.max_length}", "give a number of tokens, or null"))
    if config.form not in FORMS:
        fix = f"use one of {', '.join(FORMS)}"
        found.append(Problem(f"{key}.form", f"'{config.form}' is no form", fix))
    elif config.form == "merged":
        found += unmergeable(plan)
    else:
        found += _adapter_folder.problems(plan)
        planned, names = _adapter_lint.planned(plan)
        found += [
            Problem(f"{key}.form", f"{server.title} does not take this adapter: {fault}", f"use {key}.form=merged")
            for fault in (*_adapter_lint.config_faults(planned), *server.planned_faults(planned, names))
        ]
        if plan.run.model and scaling(plan.run.model, plan.family):
            message = f"{server.title} would serve the base with its own RoPE, and the adapter was trained over another"
            found.append(Problem(f"{key}.form", message, f"use {key}.form=merged"))
        if makes_up_for_rounding(plan):
            message = (
                f"{server.title} would serve the base in 16 bits, and an adapter of loftq is right over 4 bits only"
            )
            found.append(Problem(f"{key}.form", message, f"use {key}.form=merged"))
    return found


def export(plan: Plan, checkpoint: Checkpoint, server: Server, config: ServedConfig) -> Path:
    """Write `export/<server>` with SERVE.md.

    Raises Refused for an adapter that the server does not take.
    """
    target = plan.output_dir / "export" / server.name
    with whole_folder(target) as folder:
        if config.form == "merged":
            _serving.copy_merged(checkpoint.merged(), folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
            options = _merged_options(plan, server, folder)
            model = "."
        else:
            _adapter_folder.write(checkpoint, folder)
            options = _adapter_options(plan, server, folder)
            model = base_of(plan)
        _serving.generation_settings(checkpoint).save_pretrained(folder)
        length = config.max_length or _serving.context_length(checkpoint)
        line = _serving.command([*server.start, model], {**options, server.context: length})
        notes = _notes(checkpoint, server, config)
        (folder / GUIDE).write_text(_serving.guide(server.title, line, notes), encoding="utf-8")
    return target


def serve_line(target: Path) -> str:
    """The command of a folder's SERVE.md."""
    return (target / GUIDE).read_text(encoding="utf-8").split("```sh\n")[1].split("\n```")[0]


def artifact(server: Server, config: ServedConfig, target: Path, checks: dict[str, Any]) -> Artifact:
    """The artifact, with its command in the note."""
    note = f"in the folder: {serve_line(target)}"
    if config.form == "adapter":
        checks = {**checks, "lint": _adapter_lint.lint(target).checks()}
    return Artifact.of(server.name, target, note, checks)


def read_back(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """What PEFT makes of an adapter, or transformers of a merged model."""
    from ftcore.read_back import read_back_folder

    if (folder / "adapter_config.json").is_file():
        return _adapter_folder.read_back(checkpoint, folder)
    return read_back_folder(checkpoint, folder)


def base_of(plan: Plan) -> str:
    """The base checkpoint as a server is given it: a folder, or an id on the hub."""
    from ftcore import checkpoint

    assert plan.run.model is not None
    place = checkpoint.locate(plan.run.model, plan.family)
    return str(Path(place).absolute()) if Path(place).is_dir() else place


def _merged_options(plan: Plan, server: Server, folder: Path) -> dict[str, object]:
    return {server.served: _serving.served_name(plan), "dtype": _serving.stored_dtype(folder)}


def _adapter_options(plan: Plan, server: Server, folder: Path) -> dict[str, object]:
    found = _adapter_lint.lint(folder, _adapter_lint.serving_names(plan))
    if faults := server.faults(found):
        message = f"{server.title} does not take this adapter: {faults[0]}"
        raise Refused(Problem(f"export.{server.name}.form", message, f"use export.{server.name}.form=merged"))
    quantizer = plan.run.quantizer
    template = "./chat_template.jinja" if (folder / "chat_template.jinja").is_file() else None
    return {
        "revision": plan.run.model.revision if plan.run.model else None,
        "dtype": "auto" if plan.dtype == "float32" else plan.dtype,
        "quantization": "bitsandbytes" if quantizer is not None and quantizer.name == "bnb_nf4" else None,
        **server.adapter(_serving.served_name(plan), found.max_lora_rank),
        "chat-template": template,
        **server.ends,
    }


def _notes(checkpoint: Checkpoint, server: Server, config: ServedConfig) -> list[str]:
    plan = checkpoint.plan
    tokenizer: Any = checkpoint.tokenizer
    ends = _serving.turn_ends(checkpoint)
    words = ", ".join(f"`{word}`" for word in tokenizer.convert_ids_to_tokens(ends))
    notes = [f'Requests name the model `{_serving.served_name(plan)}`: `"model": "{_serving.served_name(plan)}"`.']
    if config.form == "merged" or server.ends:
        notes.append(f"Answers end at {words} (`generation_config.json`).")
    else:
        notes.append(f'Answers end where the base\'s own end; send `"stop_token_ids": {ends}` to end them at {words}.')
    quantizer = plan.run.quantizer
    if config.form == "adapter" and quantizer is not None and quantizer.name != "bnb_nf4":
        notes.append(
            f"It was trained over weights packed by {quantizer.name}; the base is served as its checkpoint is."
        )
    return notes
