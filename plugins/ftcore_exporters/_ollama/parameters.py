"""What a Modelfile sets besides the template: sampling, context and where an answer ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftcore import Plan
from ftcore_exporters._ollama.layouts import Layout
from ftcore_exporters._ollama.modelfile import unwritable
from ftcore_exporters._recorded import recorded

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""transformers' names of settings to Ollama's."""
USUAL = 4096
"""Ollama's own context in tokens where a Modelfile names none."""


def sampling(plan: Plan, generation: GenerationConfig | None) -> Iterator[tuple[str, float]]:
    """The checkpoint's settings; where it has none, those that the family's authors recommend. As in the GGUF file."""
    stored: dict[str, Any] = generation.to_diff_dict() if generation is not None else {}
    if not stored.get("do_sample") or not SAMPLING.keys() & stored.keys():
        stored = dict(next(iter(plan.family.sampling.values()), {}))
    for name, key in SAMPLING.items():
        if stored.get(name) is not None:
            yield key, float(stored[name])


def context(plan: Plan, config: PretrainedConfig, wanted: int | None) -> int:
    """Tokens of context: what is asked for, or as many as training rows had, Ollama's own number at least.

    Never more than the GGUF file allows.
    """
    from ftcore_exporters.gguf.hyperparameters import context_length

    assert plan.family.gguf is not None
    trainer = plan.run.trainer
    known = (recorded(plan).get("trainer") or {}) if plan.run.run else {}  # a later export has no trainer
    trained = known.get("max_length") if trainer is None else trainer.max_length
    return min(wanted or max(USUAL, trained or 0), context_length(config.get_text_config(), plan.family.gguf))


def stops(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, layout: Layout | None
) -> list[str]:
    """Tokens that end an answer: of the generation config, the tokenizer, the layout and the family, once each."""
    ids = getattr(generation, "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    known = tokenizer.get_vocab()
    named: list[str | None] = [tokenizer.convert_ids_to_tokens(i) for i in ids if i < len(tokenizer)]
    named += [tokenizer.eos_token, layout.assistant[1].strip() if layout else None]
    named += plan.family.chat.turn_ends if plan.family.chat else ()
    found = [str(token) for token in named if token and token in known and not unwritable(token)]
    return list(dict.fromkeys(found))
