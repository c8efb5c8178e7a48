"""What a model says to a prompt: for the answers before and after training, and for `ftcore chat`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftcore.config import SamplingConfig
from ftcore.tokens import render

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def answers_to(
    prompts: Sequence[str],
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingConfig,
    continues: bool = False,
) -> list[str]:
    """One answer per prompt, each in a conversation of its own.

    :param continues: prompts are texts to go on with, whatever the chat template.
    """
    if continues:
        return [_continuation(prompt, model, tokenizer, sampling) for prompt in prompts]
    system = [{"role": "system", "content": sampling.system}] if sampling.system else []
    return [answer([*system, {"role": "user", "content": prompt}], model, tokenizer, sampling) for prompt in prompts]


def answer(
    messages: Sequence[dict[str, str]], model: Any, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig
) -> str:
    """The assistant's next message. A tokenizer without a chat template continues the last message's text."""
    if not tokenizer.chat_template:
        return _continuation(messages[-1]["content"], model, tokenizer, sampling)
    text = render(tokenizer, messages, generate=True)
    return _written(tokenizer(text, add_special_tokens=False, return_tensors="pt"), model, tokenizer, sampling)


def _continuation(text: str, model: Any, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig) -> str:
    return _written(tokenizer(text, return_tensors="pt"), model, tokenizer, sampling)


def _written(given: Any, model: Any, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig) -> str:
    import torch
    from transformers import GenerationConfig

    inputs = given.to(model.device)
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature > 0 else {}
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        eos_token_id=end_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **drawn,
    )
    with evaluating(model), torch.no_grad():
        ids = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
        )
    said = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(said).strip()


def end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: the tokenizer's and those of the model's generation config."""
    config = getattr(model.generation_config, "eos_token_id", None)
    ids = {tokenizer.eos_token_id, *(config if isinstance(config, list) else [config])}
    return sorted(i for i in ids if i is not None)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and back to what it was."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
