"""The fast generator and transformers' over one tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ftcore import hooks as h
from ftcore import pipeline
from ftcore.testing import runs
from ftcore_generators.fast import FastGenerator
from ftcore_generators.transformers import TransformersGenerator


class Both(NamedTuple):
    """The generator over a tiny model, and transformers' over the same."""

    fast: FastGenerator
    plain: TransformersGenerator
    model: Any


def both(*words: str, family: str = "llama") -> Both:
    """An adapter that does something, fp32."""
    tiny = (f"+model={family}", "model.tiny=true", "model.dtype=float32", "+trainer=grpo", "generator=fast")
    hooks, plan = runs.prepared([*tiny, *words])
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model)
    fast: Any = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
    return Both(fast, TransformersGenerator(loaded.model, loaded.tokenizer, 64), loaded.model)


def prompts_of(*lengths: int) -> list[list[int]]:
    """Random bytes."""
    drawn = torch.Generator().manual_seed(5)
    return [torch.randint(0, 256, (length,), generator=drawn).tolist() for length in lengths]


def logprobs_of(
    model: Any, prompt: Sequence[int], said: Sequence[int], temperature: float, **media: Any
) -> torch.Tensor:
    """Of a completion's tokens, by one pass over everything."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *said]], device=model.device)
        media = {name: x.to(model.device) if torch.is_tensor(x) else x for name, x in media.items()}
        logits = model.eval()(input_ids=ids, **media).logits[0].float()
    scores = (logits / temperature).log_softmax(-1)[len(prompt) - 1 : -1]
    return scores.gather(1, torch.tensor(said, device=model.device)[:, None])[:, 0].cpu()
