"""Answers end where turns do, also over a base checkpoint that names the end of a document alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from generators_on_tiny import prompts_of

from ftcore import Sampling, pipeline
from ftcore import hooks as h
from ftcore.answers import Answers, end_ids
from ftcore.config import SamplingConfig
from ftcore.errors import Refused
from ftcore.template_facts import ends_of
from ftcore.testing import runs

QWEN = ("+model=qwen2", "model.tiny=true", "model.dtype=float32")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Its end token is one that ends no turn, as Qwen2.5's base checkpoints have it."""
    hooks, plan = runs.prepared([*QWEN, "adapter=full"])
    loaded, folder = pipeline.load(hooks, plan), tmp_path / "base"
    model, tokenizer = loaded.model, loaded.tokenizer
    tokenizer.eos_token = tokenizer.pad_token
    model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded_from(base: Path, *words: str) -> Any:
    hooks, plan = runs.prepared(["+model=qwen2", f"model.path='{base}'", "model.dtype=float32", *words])
    return hooks, plan, pipeline.load(hooks, plan)


def test_generation_ends_where_the_plan_says_that_it_does(base: Path) -> None:
    _, plan, loaded = loaded_from(base)
    names = {loaded.tokenizer.convert_ids_to_tokens(one) for one in end_ids(loaded.model, loaded.tokenizer)}
    assert names == set(ends_of(plan, loaded.tokenizer)) > {"<|im_end|>"}


@pytest.mark.parametrize("generator", ["fast", "transformers"])
def test_completions_end_with_a_turn(base: Path, generator: str) -> None:
    hooks, plan, loaded = loaded_from(base, "+trainer=grpo", f"generator={generator}")
    end = loaded.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def likeliest(module: Any, args: Any, logits: Any) -> Any:
        logits[..., end] = 1e4
        return logits

    loaded.model.get_output_embeddings().register_forward_hook(likeliest)
    made = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
    written = made.generate(prompts_of(4, 9), Sampling(max_new_tokens=6, temperature=0.0)).ids
    assert written == [[end], [end]]


def test_exports_end_there_too(base: Path, tmp_path: Path) -> None:
    hooks, _, loaded = loaded_from(base, "+export=[safetensors]", f"output_dir='{tmp_path / 'run'}'")
    (artifact,) = pipeline.export(hooks, loaded)
    written = json.loads((artifact.path / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(written) == end_ids(loaded.model, loaded.tokenizer)


def test_a_conversation_that_passes_the_context_is_refused(base: Path) -> None:
    hooks, plan, loaded = loaded_from(base, "generator=fast")
    made = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
    context = loaded.model.config.max_position_embeddings
    answers = Answers(made, loaded.model, loaded.tokenizer, SamplingConfig(max_new_tokens=8))
    with pytest.raises(Refused, match=f"pass the {context} of the model's context"):
        answers.next([{"role": "user", "content": "x" * context}], lambda text: None)
    with pytest.raises(Refused, match=r"sampling\.max_new_tokens"):
        answers.to(["Hi", "x" * context])
