"""Prompts through the TEMPLATE as llama.cpp, which is in Ollama, reads them, against the trained model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftcore_exporters._ollama.fit import PROBES, Jinja

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftcore_exporters._ollama.export import Template


def prompt_checks(file: Path, template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """`template_prompts`, the share of conversations with the same token ids; empty without TEMPLATE or llama.cpp."""
    from ftcore.llama_cpp import LlamaCpp, installed

    found = template.fit
    if found is None or not installed():
        return {}
    jinja, same = Jinja(tokenizer, strips_bos=False), []
    with LlamaCpp(file, vocab_only=True) as llama:
        for talk in PROBES:
            text = jinja(talk)
            if text is None or (found.no_system and talk[0][0] == "system"):
                continue
            ids = tokenizer.encode(text, add_special_tokens=False)
            same.append(llama.tokens(template.begin + found.layout.render(talk), bos=True) == ids)
    share = sum(same) / len(same)
    checks: dict[str, Any] = {"template_prompts": share}
    if share < 1:
        reason = f"{len(same) - sum(same)} of {len(same)} prompts have other tokens through the TEMPLATE"
        checks |= {"verified": False, "reason": reason}
    return checks
