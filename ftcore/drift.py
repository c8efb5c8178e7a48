"""What changed between the beginning of a run and going on with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from ftcore import checkpoint, rows, templates
from ftcore.config import RunConfig
from ftcore.errors import Refused
from ftcore.run_state import read_run
from ftcore.specs import Plan

RECORD = "config.yaml"
FREE = frozenset(
    {
        *("output_dir", "run", "resume", "gguf", "objective", "prompts", "sampling", "preview", "export", "extra"),
        *("kernels", "patching", "memory", "memory_limit", "gpu_memory", "gpu", "host_memory"),
        "graphs",
        *("trainer.max_steps", "trainer.epochs", "trainer.logging_steps", "trainer.save_steps", "trainer.eval_steps"),
        *("trainer.micro_batch", "generator.batch", "generator.prompt_tokens", "generator.memory_fraction"),
    }
)
"""Keys that say how long, how fast and how visibly a run trains, but not what it would become by the same step."""
FOUND = "found"
"""Mark in the metadata of a config's field: where it is left out, the plan finds it in the rows, and records it."""
ALIKE = {
    ("trainer.optimizer", "adamw_torch_fused"): "adamw_torch",
    ("generator.name", "fast"): "transformers",  # both draw from the weights that are trained
}
"""Values that differ in speed and rounding from another one, as kernels do."""
ENDS = 2**20
"""Bytes at the front and the end of each file of weights that stand for all: reading many gigabytes takes minutes."""


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was."""

    key: str
    before: Any
    now: Any


def kept_free(plan: Plan) -> frozenset[str]:
    """Keys that are free for the plan's trainer: one that compares the rows of a micro-batch keeps their number."""
    return FREE - {"trainer.micro_batch"} if plan.trainer and plan.trainer.compares else FREE


def of_command(run: RunConfig, folder: Path) -> Iterator[Change]:
    """As :func:`of_config` for a config that no plan was made of yet: what a plan will find is no change."""
    trainer = run.trainer
    marked = {field.name for field in fields(trainer) if field.metadata.get(FOUND)} if trainer else set()
    left_out = (name for name, value, default in _members(trainer) if name in marked and value == default)
    return of_config(run, folder, FREE.union(f"trainer.{name}" for name in left_out))


def of_config(run: RunConfig, folder: Path, free: frozenset[str] = FREE) -> Iterator[Change]:
    """Keys whose value is not the one that the run in `folder` began with.

    A key that ftcore did not have yet counts where it is not at its default: that is what the run began with.

    :param free: Keys that do not count, with all below them.
    """
    record = yaml.safe_load((folder / RECORD).read_text(encoding="utf-8")) or {}
    old, new = _flat(record), _flat(asdict(run))
    added = frozenset(_added(run, record))
    for key in sorted({*old, *new}):
        parts = key.split(".")
        counts = all(".".join(parts[:count]) not in free for count in range(1, len(parts) + 1))
        if counts and key not in added and _plain(key, old.get(key)) != _plain(key, new.get(key)):
            yield Change(key, old.get(key), new.get(key))


def of_inputs(plan: Plan) -> Iterator[Change]:
    """Files that are not those that the run began with."""
    old = (read_run(plan.output_dir) or {}).get("inputs") or {}
    new = fingerprints(plan)
    for key in sorted({*old} & {*new}):
        if old[key] != new[key]:
            yield Change(key, old[key], new[key])


def fingerprints(plan: Plan) -> dict[str, str]:
    """Hashes of what a run reads, by the key that names it; what is not on this machine is left out.

    Of files of weights, sizes and both ends count, of all others every byte.
    """
    from ftcore import __version__

    found = {"ftcore": __version__.partition(".")[0]}
    data, model = plan.run.data, plan.run.model
    if data is not None:
        for key, path in (("data.path", data.path), ("data.eval_path", data.eval_path)):
            if path and (known := of_rows(path, key)):
                found[key] = known
        if data.template:
            found["data.template"] = hashlib.sha256(templates.read(data.template).encode()).hexdigest()[:16]
    if model is not None and (source := checkpoint.find(model, plan.family)).kind in ("path", "package"):
        place = Path(source.name)
        folder = place if place.is_dir() else None
        weights = sorted(folder.glob("*.safetensors")) if folder else [place]
        config = [folder / "config.json"] if folder else []
        found["model.weights"] = _hash([*config, *weights], ends=True)
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
        if folder and (own := [folder / name for name in names if (folder / name).is_file()]):
            found["model.tokenizer"] = _hash(own)
    return found


def of_rows(path: Any, key: str) -> str | None:
    """The hash of data files on this machine; None of data from elsewhere."""
    files = _local(path, key)
    return _hash(files) if files else None


def _local(path: Any, key: str) -> list[Path]:
    try:
        return [file for one in rows.sources(path, key) for file in rows.local_files(one, key) or ()]
    except Refused:  # said by another check
        return []


def _hash(files: list[Path], ends: bool = False) -> str:
    """One hash of the files' names and contents, in their order."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        with file.open("rb") as handle:
            if not ends or file.stat().st_size <= 2 * ENDS:
                total.update(hashlib.file_digest(handle, "sha256").digest())
                continue
            total.update(f"{file.stat().st_size}".encode() + handle.read(ENDS))
            handle.seek(-ENDS, 2)
            total.update(handle.read(ENDS))
    return total.hexdigest()[:16]


def _plain(key: str, value: Any) -> Any:
    """What stands for a value when two are compared."""
    return ALIKE.get((key, value), value) if isinstance(value, str) else value


def _added(section: Any, record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Keys at their default that are missing in the record of a section which is there."""
    for name, value, default in _members(section):
        if name not in record:
            if default is not MISSING and value == default:
                nested = is_dataclass(value)
                yield from _flat({name: asdict(value) if nested else value}, prefix)
        elif isinstance(record[name], Mapping):
            yield from _added(value, record[name], f"{prefix}{name}.")


def _members(section: Any) -> Iterator[tuple[str, Any, Any]]:
    """Names, values and defaults; a plugin that is selected has no default."""
    if isinstance(section, Mapping):
        yield from ((name, value, MISSING) for name, value in section.items())
    elif is_dataclass(section):
        for field in fields(section):
            default = field.default if field.default_factory is MISSING else field.default_factory()
            yield field.name, getattr(section, field.name), default


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots; what is empty counts as null."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        value = value.value if isinstance(value, Enum) else value
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{key}.")
        elif value not in (None, {}, [], ()):
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat
