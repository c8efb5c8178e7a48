"""What a saved adapter's folder says of the tokenizer that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def saved_template(folder: Path) -> str | dict[str, str] | None:
    """Its chat template, as the tokenizer has it: a text, or several by name, such as `default` and `tool_use`.

    They are files of their own, or, from older versions of transformers, in the tokenizer's config.
    """
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (default := folder / "chat_template.jinja").is_file():
        files["default"] = default
    named = {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    if not named:
        return _in_config(folder)
    return named["default"] if list(named) == ["default"] else named


def _in_config(folder: Path) -> str | dict[str, str] | None:
    found = _read(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        entries = [entry for entry in found if isinstance(entry, dict) and {"name", "template"} <= set(entry)]
        return {str(entry["name"]): str(entry["template"]) for entry in entries} or None
    return found if isinstance(found, str) else None


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
