"""Prompts that are to be completed are tried before any weight is read: on the chat template, and for their length."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused, hookimpl
from ftcore.errors import Exit
from ftcore_trainers._rendered import try_rows

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedTokenizerBase


@hookimpl(wrapper=True)
def ftcore_format_dataset(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Generator[None, DatasetDict, DatasetDict]:
    """Raises Refused for a prompt that the template does not take whole, or that leaves no room for its completion."""
    from ftcore import checkpoint

    splits = yield
    model, trainer = plan.run.model, plan.run.trainer
    assert model is not None
    context = model.max_length or checkpoint.context_length(model, plan.family)
    longest: int = trainer.max_completion_length  # type: ignore[union-attr]
    try_rows(splits, lambda row: _try(row, tokenizer, context, longest))
    return splits


def _try(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, context: int | None, longest: int) -> None:
    from ftcore.chat import render_whole

    prompt = row["prompt"]
    text = render_whole(tokenizer, prompt, answers_from=len(prompt), generate=True)
    tokens = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if context is not None and tokens + longest > context:
        message = (
            f"its {tokens:,} tokens and trainer.max_completion_length={longest} are more than the model's context of "
            f"{context:,}"
        )
        fix = f"take the row out, write fewer tokens, or use model.max_length={tokens + longest}, which scales RoPE"
        raise Refused(Problem("data", message, fix, Exit.DATA))
