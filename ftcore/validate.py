"""The strict walk: no unknown key passes, however it came in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf

from ftcore.catalog import nearest
from ftcore.config import KINDS
from ftcore.errors import Problem, refuse
from ftcore.overrides import ELSEWHERE, homes


def reject_unknown_keys(config: DictConfig) -> None:
    """Refuse keys that no dataclass of the config declares, and lists of texts that hold something else.

    Hydra lets `+trainer.lerning_rate=1` and `+modle=qwen3` through even on structured configs, so this runs on the
    composed config. Raises Refused with every finding.
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
        if not isinstance(child, Container) or child._is_none():
            continue
        if isinstance(child, DictConfig):
            yield from _unknown(child, full)
        elif isinstance(child, ListConfig) and child._metadata.element_type is str:
            yield from _not_texts(child, full)


def _problem(key: str, full: str, path: str, node: DictConfig, declared: list[str]) -> Problem:
    owner = str(node.get("name")) if path and "name" in declared else (path or "a run")
    known = [name for name in declared if name != "name"]
    near, elsewhere = nearest(key, known), homes(key)
    if near and key not in ELSEWHERE:
        fix = f"did you mean {path + '.' if path else ''}{near}?"
    elif elsewhere:
        fix = f"did you mean {' or '.join(elsewhere)}?"
    elif len(known) > 10 and path in KINDS:
        fix = f"`ftcore plugins {path}/{owner}` lists its {len(known)} keys"
    elif path:
        fix = f"its keys are {', '.join(known)}" if known else f"leave it out: {owner} has no keys"
    else:
        fix = "`ftcore --help` lists the keys"
    return Problem(full, f"{owner} has no key '{key}'", fix)


def _not_texts(items: ListConfig, full: str) -> Iterator[Problem]:
    for number, item in enumerate(items, 1):
        if not isinstance(item, str):
            what = "a list" if isinstance(item, ListConfig) else "no text"
            yield Problem(
                full,
                f"item {number} is {what}: {item}",
                f"write {full}=[text,text]; quote items with special characters",
            )
