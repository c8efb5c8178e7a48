"""Folders of weights that could do harm when they are read: pickles, and indexes that name files elsewhere."""

from __future__ import annotations

from pathlib import Path

from ftcore.errors import Exit, Problem, Refused
from ftcore.safetensors_file import indexed_files

ADVICE = "take a checkpoint in safetensors, or have its maker save it again"
PICKLES = ("bin", "pt", "pth", "ckpt", "pkl")
"""Endings of files that Python may pickle weights into."""


def problem(key: str, folder: Path) -> Problem | None:
    """Why the weights in a folder must not be read by transformers or PEFT; None where they may."""
    if not any(folder.glob("*.safetensors")):
        for file in (file for ending in PICKLES for file in sorted(folder.glob(f"*.{ending}"))):
            message = f"{folder} holds its weights as a pickle ({file.name}), which can run code when it is read"
            return Problem(key, message, ADVICE, Exit.DATA)
    try:
        for index in (i for ending in ("safetensors", "bin") for i in sorted(folder.glob(f"*.{ending}.index.json"))):
            indexed_files(index)
    except Refused as refused:
        return refused.problems[0]
    return None
