"""What the training run recorded: a later export's plan has no trainer, and for a base what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ftcore import Plan
from ftcore.config import ModelConfig

OF_ORIGIN = ("id", "path", "revision", "tiny", "shape")


def recorded(plan: Plan) -> Mapping[str, Any]:
    """The training run's config; empty where there is none beside the exports."""
    import yaml

    file = Path(plan.run.run or plan.output_dir) / "config.yaml"
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def origin(plan: Plan) -> ModelConfig:
    """The checkpoint that the run began with; of a full fine-tune `plan.run.model` is what was trained."""
    assert plan.run.model is not None
    known = (recorded(plan).get("model") or {}) if plan.run.run else {}
    given: dict[str, Any] = {name: known[name] for name in OF_ORIGIN if name in known}
    return replace(plan.run.model, **given)
