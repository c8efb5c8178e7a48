"""The strict walk: no unknown key passes, however it came in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf

from ftcore.catalog import nearest
from ftcore.errors import Problem, refuse


def reject_unknown_keys(config: DictConfig) -> None:
    """Refuse keys that no dataclass of the config declares.

    Hydra lets `+trainer.lerning_rate=1` and `+modle=qwen3` through even on structured configs, so this runs on the composed
    config. Raises Refused with every unknown key.
    """
    refuse(list(_unknown(config, "")))


def _unknown(node: DictConfig, path: str) -> Iterator[Problem]:
    cls = OmegaConf.get_type(node)
    declared = [f.name for f in fields(cls)] if cls is not None and is_dataclass(cls) else None
    for key in node:
        full = f"{path}.{key}" if path else str(key)
        if declared is not None and key not in declared:
            yield _problem(str(key), full, path, node, declared)
            continue
        child: Any = node._get_node(key) if not OmegaConf.is_missing(node, key) else None
        if isinstance(child, Container) and isinstance(child, DictConfig) and not child._is_none():
            yield from _unknown(child, full)


def _problem(key: str, full: str, path: str, node: DictConfig, declared: list[str]) -> Problem:
    owner = str(node.get("name")) if path and "name" in declared else (path or "a run")
    near = nearest(key, declared)
    if near:
        fix = f"did you mean {path + '.' if path else ''}{near}?"
    elif path:
        fix = f"its keys are {', '.join(n for n in declared if n != 'name')}"
    else:
        fix = "`ftcore --help` lists the keys"
    return Problem(full, f"{owner} has no key '{key}'", fix)
