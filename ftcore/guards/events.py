"""`events.jsonl` of a run folder: what went wrong while a run went on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftcore.redaction import redact
from ftcore.report import note

FILE = "events.jsonl"


def run_folder(arguments: Any) -> Path:
    """Folder of the run, from transformers' arguments: ftcore keeps checkpoints in a folder below it."""
    folder = Path(arguments.output_dir)
    return folder.parent if folder.name == "checkpoints" else folder


def record(folder: Path, event: str, **facts: Any) -> None:
    """Append one line. A disk that takes none must not stop the run, so that is only said."""
    line = redact(json.dumps({"event": event, "time": round(time.time(), 3), **facts}))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        note(f"{folder / FILE} cannot be written ({error.strerror}): {line}")


def recorded(folder: Path, event: str) -> Iterator[dict[str, Any]]:
    """Events of one kind, in their order; a line that a kill cut off is left out."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("event") == event:
            yield entry
