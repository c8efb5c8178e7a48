"""The names of a classifier's classes in a file of their own: an adapter's folder has no config.json to hold them.

The hook stays when a trained model is loaded again, so that a later export names its classes as well.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ftcore import Plan, hookimpl
from ftcore.companions import saved_beside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "classes.json"


@hookimpl(wrapper=True)
def ftcore_load_tokenizer(plan: Plan) -> Generator[None, PreTrainedTokenizerBase, PreTrainedTokenizerBase]:
    """Saved with the names of the classes."""
    tokenizer = yield
    saved_with_names(plan, tokenizer)
    return tokenizer


def saved_with_names(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer's `save_pretrained` write the classes that the plan's head tells apart."""
    if names := plan.family.settings.get("id2label"):
        saved_beside(tokenizer, partial(_write, [names[number] for number in sorted(names)]))


def _write(names: Sequence[str], folder: Path) -> None:
    (folder / NAME).write_text(json.dumps(names) + "\n", encoding="utf-8")


def of_adapter(plan: Plan) -> list[str]:
    """The classes of the saved adapter that is trained on; empty where there is none, or it names none."""
    path = getattr(plan.run.adapter, "path", None)
    file = Path(path, NAME) if path else None
    try:
        names = json.loads(file.read_text(encoding="utf-8")) if file and file.is_file() else []
    except ValueError:  # damaged: as one that names none
        return []
    return [str(name) for name in names] if isinstance(names, list) else []
