"""ftcore's `generator=fast` over the model that a run of its GRPO would train."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from stepbench.sides.ftcore import model_words

from rollbench.timing import shaken, timed
from rollbench.works import RollWork


def run(work: RollWork) -> dict[str, Any]:
    """The generator as a trainer has it; only the end token and the lengths are the bench's."""
    from ftcore import Sampling, pipeline
    from ftcore import hooks as h
    from ftcore.answers import evaluating
    from ftcore.api import validated
    from ftcore_kernels.decoding import weights
    from ftcore_kernels.decoding.requests import Request

    words = [*model_words(work), "+trainer=grpo", "generator=fast"]
    with tempfile.TemporaryDirectory() as scratch:
        hooks, plan = pipeline.prepare(validated([*words, f"output_dir={scratch}/run"]))
        loaded = pipeline.load(hooks, plan)
        generator: Any = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
    shaken(loaded.model)
    weights.PREFERRED = work.weights or weights.PREFERRED
    prompts, lengths = work.prompts(loaded.model.config.get_text_config().vocab_size), work.lengths()
    sampling = Sampling(max_new_tokens=work.new, temperature=0.0)

    def write(rows: Sequence[int]) -> list[list[int]]:
        with evaluating(loaded.model):
            engine = generator._ready()
            assert engine is not None, "the engine does not take this model"
            try:
                wanted = [Request(at, tuple(prompts[row]), lengths[row], row) for at, row in enumerate(rows)]
                ids: list[list[int]] = engine.run(wanted, sampling, []).ids
                return ids
            finally:
                engine.close()

    rows = range(work.rows)
    result = timed(work, write, rows, rows)
    return {**result, "ftcore": " ".join(words)}
