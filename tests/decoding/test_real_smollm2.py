"""SmolLM2-135M, the real weights in fp32: what the fast generator writes is what transformers writes."""

from __future__ import annotations

import random

import pytest
import torch
from generators_on_tiny import both, logprobs_of

from ftcore import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
WORDS = ("the", "sun", "rises", "over", "hills", "and", "a", "river", "runs", "to", "sea", "where", "boats", "wait")
LONGEST, NEW = 60, 12


def prompts(tokenizer: object, number: int) -> list[list[int]]:
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(WORDS, k=1 + at * LONGEST // number)) for at in range(number)]
    found: list[list[int]] = tokenizer(texts)["input_ids"]  # type: ignore[operator]
    assert len({len(ids) for ids in found}) > number // 2, "of different lengths"
    return found


def test_64_prompts_with_and_without_an_adapter() -> None:
    """Greedy, token for token; and the log-probabilities of draws are those of a pass over everything."""
    made = both("model.tiny=false", family="smollm2")
    given, sampling = prompts(made.plain._tokenizer, 64), Sampling(max_new_tokens=NEW, temperature=0.0)
    said = made.fast.generate(given, sampling).ids
    assert said == made.plain.generate(given, sampling).ids
    with made.model.disable_adapter():
        plain = made.fast.generate(given, sampling).ids
        assert plain == made.plain.generate(given, sampling).ids
    assert plain != said, "the adapter does something"
    assert made.fast._engine is not None
    torch.manual_seed(0)
    found = made.fast.generate(given[::8], Sampling(max_new_tokens=NEW))
    assert found.logprobs is not None
    for prompt, ids, logprobs in zip(given[::8], found.ids, found.logprobs, strict=True):
        expected = logprobs_of(made.model, prompt, ids, 1.0)
        assert float((torch.tensor(logprobs) - expected).abs().max()) < 1e-4
