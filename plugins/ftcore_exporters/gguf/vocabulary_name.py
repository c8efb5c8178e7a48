"""Tokens that take the space after them: llama.cpp knows of Phi-3's alone, and by the model's name."""

from __future__ import annotations

from typing import Any

_MARKS = ("phi-3", "phi3")
_PLAIN = ("<unk>", "<s>", "<|endoftext|>")
"""Phi-3's special tokens that take no space."""


def strips_as_phi3(backend: dict[str, Any]) -> bool:
    """Whether special tokens take the space after them just as Phi-3's do, which llama.cpp can do for a whole model."""
    added = {token["content"]: token for token in backend["added_tokens"]}
    return {"</s>", *_PLAIN} <= added.keys() and all(
        not token["lstrip"] and token["rstrip"] == (text not in _PLAIN) for text, token in added.items()
    )


def fitting_name(name: str, backend: dict[str, Any]) -> str:
    """The model's name with `phi-3` in it where llama.cpp shall treat special tokens as Phi-3's, and else without.

    Its `llama-vocab.cpp` looks for `phi-3` or `phi3` in `general.name`, and then fails on a vocabulary without
    Phi-3's tokens.
    """
    marked = any(mark in name.lower() for mark in _MARKS)
    if strips_as_phi3(backend):
        return name if marked else f"{name} (phi-3)"
    for mark in _MARKS if marked else ():
        start = name.lower().find(mark)
        while start >= 0:
            name = f"{name[:start]}phi 3{name[start + len(mark) :]}"
            start = name.lower().find(mark)
    return name
