"""What a saved adapter's folder says of the tokenizer that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def saved_template(folder: Path) -> str | None:
    """Its chat template: a file of its own, or, from older versions of transformers, in the tokenizer's config."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _read(folder / "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) else None


def saved_tokens(folder: Path) -> dict[str, int]:
    """Its added tokens and their ids; empty where no tokenizer was saved."""
    found = _read(folder / "tokenizer.json").get("added_tokens")
    tokens = [token for token in found if isinstance(token, dict)] if isinstance(found, list) else []
    return {str(token["content"]): int(token["id"]) for token in tokens if {"content", "id"} <= set(token)}


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, or damaged, which its reader will say
        return {}
    return found if isinstance(found, dict) else {}
