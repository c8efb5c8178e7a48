"""What a server is told about a folder: where answers end, how long a context is, and the command that starts it."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore import Checkpoint, Plan
from ftcore.answers import turn_end_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig


def turn_ends(checkpoint: Checkpoint) -> list[int]:
    """Ids of the tokens that end an answer: the model's own, the tokenizer's, and those of the family's templates."""
    own = getattr(checkpoint.generation(), "eos_token_id", None)
    tokenizer: Any = checkpoint.tokenizer
    named = turn_end_ids(checkpoint.plan.family, tokenizer)
    found = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, *named]
    return list(dict.fromkeys(token for token in found if token is not None))


def generation_settings(checkpoint: Checkpoint) -> GenerationConfig:
    """The merged model's `generation_config.json`, by which servers sample, with all tokens that end an answer."""
    from transformers import GenerationConfig

    settings = copy.deepcopy(checkpoint.generation()) or GenerationConfig()
    if ends := turn_ends(checkpoint):
        settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    return settings


def context_length(checkpoint: Checkpoint) -> int | None:
    """Longest context in tokens; None where the config does not say."""
    length = getattr(checkpoint.config().get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def stored_dtype(folder: Path) -> str:
    """The type of a checkpoint folder's weights, as servers name it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def served_name(plan: Plan) -> str:
    """The name by which requests ask for the model: the run folder's, with letters that need no quotes."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plan.output_dir.absolute().name).strip("-.") or "ftcore"


def command(words: Sequence[str], options: Mapping[str, object]) -> str:
    """One line for a shell; options that are None are left out, True stands for a bare flag."""
    line = list(words)
    for name, value in options.items():
        if value is not None:
            line += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(line)


def copy_merged(merged: Path, folder: Path) -> None:
    """The merged model into `folder`: weights as hard links where the disk has them, everything else as a copy."""
    for file in sorted(merged.iterdir()):
        target = folder / file.name
        if file.suffix == ".safetensors":
            try:
                os.link(file, target)
                continue
            except OSError:  # another disk, or one without links
                pass
        shutil.copy2(file, target)


def guide(title: str, line: str, notes: Sequence[str]) -> str:
    """The text of SERVE.md."""
    listed = "".join(f"- {note}\n" for note in notes)
    return f"# Serve with {title}\n\nIn this folder:\n\n```sh\n{line}\n```\n\n{listed}"
