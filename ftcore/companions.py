"""Files that belong beside a checkpoint, written wherever its tokenizer is saved: the run, its checkpoints, exports."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def saved_beside(tokenizer: PreTrainedTokenizerBase, write: Callable[[Path], object]) -> None:
    """Make this one tokenizer's `save_pretrained` call `write(folder)` as well.

    Every trainer and exporter saves the tokenizer, so nothing else has to know of the files.
    """
    vars(tokenizer)["save_pretrained"] = partial(_save, tokenizer.save_pretrained, write)


def _save(own: Callable[..., Any], write: Callable[[Path], object], folder: Any, *args: Any, **kwargs: Any) -> Any:
    written = own(folder, *args, **kwargs)
    write(Path(folder))
    return written
