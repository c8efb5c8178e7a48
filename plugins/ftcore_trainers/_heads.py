"""Checks that trainers with a head of their own share: there is such a head, and nothing asks for text."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ftcore import Plan, Problem


def check_head(plan: Plan, mapping: str) -> Iterator[Problem]:
    """The family has the head, and the run asks for no answers and no packed rows.

    :param mapping: transformers' table of the models that have it, such as `MODEL_MAPPING_NAMES`.
    """
    assert plan.run.trainer is not None and plan.run.model is not None and plan.trainer is not None
    name, known = plan.run.trainer.name, model_types(mapping)
    if known and not known & set(plan.family.model_types):
        message = f"transformers has no {plan.trainer.auto_class} of {plan.run.model.name}, which {name} needs"
        yield Problem("trainer", message, _use_one_of(known))
    if plan.run.prompts:
        yield Problem("prompts", f"{name} trains no model that answers prompts", "leave it out")
    if plan.run.trainer.packing:
        yield Problem("trainer.packing", f"{name} trains rows, which are not packed", "leave it out")


def _use_one_of(model_types: set[str], shown: int = 4) -> str:
    """The fix that names installed families of these model types."""
    from ftcore.catalog import installed
    from ftcore.coverage import family_of

    options = installed().options("model")
    names = [o.name for o in options if (family := family_of(o)) and model_types & set(family.model_types)]
    if not names:
        return "select another trainer"
    more = " or another family that has one" if len(names) > shown else ""
    return f"use {' or '.join(f'+model={name}' for name in names[:shown])}{more}"


def model_types(mapping: str) -> set[str]:
    """Keys of a table of transformers' `modeling_auto`, read from its source; empty where there is no such table."""
    spec = importlib.util.find_spec("transformers")
    file = Path(spec.origin or "").parent / "models" / "auto" / "modeling_auto.py" if spec else Path()
    tree = ast.parse(file.read_text(encoding="utf-8") if file.is_file() else "")
    tables = (n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == mapping)
    pairs = (pair for table in tables for pair in ast.walk(table) if isinstance(pair, ast.Tuple) and pair.elts)
    return {key.value for pair in pairs if isinstance(key := pair.elts[0], ast.Constant) and isinstance(key.value, str)}
