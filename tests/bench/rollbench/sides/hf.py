"""transformers' `generate` over PEFT's model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stepbench.sides import hf

from rollbench.timing import shaken, timed
from rollbench.works import RollWork


def run(work: RollWork) -> dict[str, Any]:
    """Left-padded batches; rows stop at their lengths, and a batch with its longest."""
    model = hf.adapted(work, hf.base(work))
    model.config.use_cache = model.config.get_text_config().use_cache = True
    return written(work, model.eval())


def written(work: RollWork, model: Any) -> dict[str, Any]:
    """Also Unsloth's, whose model has the same `generate`."""
    import torch
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    shaken(model)
    prompts, lengths = work.prompts(model.config.get_text_config().vocab_size), work.lengths()
    size = work.batch or work.rows

    class Stop(StoppingCriteria):  # type: ignore[misc]
        def __init__(self, width: int, limits: list[int]) -> None:
            self._last = torch.tensor(limits, device=model.device) + width

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] >= self._last

    def write(rows: Sequence[int]) -> list[list[int]]:
        found: list[list[int]] = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            width = max(len(prompts[row]) for row in part)
            ids = torch.tensor([[0] * (width - len(prompts[row])) + prompts[row] for row in part])
            mask = torch.tensor([[0] * (width - len(prompts[row])) + [1] * len(prompts[row]) for row in part])
            limits = [lengths[row] for row in part]
            settings = GenerationConfig(
                max_new_tokens=max(limits), do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
            )
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=settings,
                    stopping_criteria=StoppingCriteriaList([Stop(width, limits)]) if work.group else None,
                )
            out = out[:, width:].tolist()
            found += [row[:limit] for row, limit in zip(out, limits, strict=True)]
        return found

    model.generation_config.eos_token_id = None
    rows = range(work.rows)[: size * work.parts or None]
    return timed(work, write, rows, [min(rows, key=lambda row: lengths[row])] * min(size, 8))
