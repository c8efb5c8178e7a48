"""The rows of a run by split, and what is said of a hook that gives something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ftcore import hooks as h
from ftcore.errors import PluginError
from ftcore.manager import Hooks
from ftcore.specs import Plan

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase


def read(hooks: Hooks, plan: Plan) -> DatasetDict:
    """The raw rows. Raises PluginError where `ftcore_load_dataset` gives no mapping with a `train` split."""
    rows = hooks.first(h.ftcore_load_dataset, plan=plan)
    _check("ftcore_load_dataset", rows, "train")
    return rows


def formatted(hooks: Hooks, plan: Plan, raw: DatasetDict, tokenizer: PreTrainedTokenizerBase) -> DatasetDict:
    """The rows as the trainer takes them. Raises PluginError where `ftcore_format_dataset` gives no such mapping."""
    rows = hooks.first(h.ftcore_format_dataset, plan=plan, dataset=raw, tokenizer=tokenizer)
    _check("ftcore_format_dataset", rows, "train" if "train" in raw else "eval")
    return rows


def _check(hook: str, rows: Any, split: str) -> None:
    if isinstance(rows, Mapping) and split in rows:
        return
    has = f"the splits {', '.join(map(str, rows)) or 'none'}" if isinstance(rows, Mapping) else type(rows).__name__
    raise PluginError(
        f"{hook} gives the rows by split, with one called {split}, and this is {has}\n"
        f"    fix: return DatasetDict({{'{split}': ...}})"
    )
