"""What transformers leaves out when it reads a tokenizer from a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerBase

DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "codeshell", "command-r"})
"""Pre-tokenizers of llama.cpp that split off each digit before GPT-2's regular expression (`llama-vocab.cpp`)."""


def mend(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Give the tokenizer the splitting that the file's `tokenizer.ggml.pre` names; transformers takes GPT-2's for all.

    Nothing is changed for names that it does not know.
    """
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    if field is not None and field.contents() in DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = _digits_apart()


def _digits_apart() -> PreTokenizer:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
