"""`generator=vllm`: whose weights write, how the engine is called, and what the plan refuses.

vLLM itself is a stand-in here (`fake_vllm`); the last test needs the real one and a GPU.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import torch

import ftcore
from ftcore import hooks as h
from ftcore import pipeline
from ftcore.answers import evaluating
from ftcore.errors import Refused
from ftcore.merge import write_merged
from ftcore.specs import Loaded, Sampling
from ftcore.testing import runs

TINY = ("+model=qwen3", "model.tiny=true", "model.dtype=float32", "+trainer=grpo")
PROMPTS = [[72, 105], [67, 111, 117, 110, 116, 32, 116, 111]]
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The engines of a test; the fake is installed."""
    return fake_vllm.install(tmp_path, monkeypatch).made


def made(*words: str) -> tuple[Any, Loaded]:
    """The generator, over a model that has moved off its checkpoint."""
    hooks, plan = runs.prepared([*TINY, "generator=vllm", *words])
    loaded = pipeline.load(hooks, plan)
    runs.shake(loaded.model, trainable_only=True)
    generator = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
    return generator, loaded


def scored(model: Any, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """Log-probability of each token of the completion, by the model that is trained."""
    with evaluating(model), torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion], device=model.device)).logits[
            0, len(prompt) - 1 : -1
        ]
    logprobs = (logits.float() / temperature).log_softmax(-1)
    return [float(row[token]) for row, token in zip(logprobs, completion, strict=True)]


SETTINGS = [(), ("adapter.variant=rslora", "adapter.r=5"), ("model.max_length=8192",), ("adapter=full",)]


@pytest.mark.parametrize("words", SETTINGS, ids=str)
def test_completions_are_the_trained_model_s_own(engines: list[Any], words: tuple[str, ...]) -> None:
    """With the log-probabilities under the temperature, after the first handover and after the next."""
    generator, loaded = made(*words)
    for _ in range(2):
        generator.begin_rollout()
        said = generator.generate(PROMPTS, Sampling(max_new_tokens=8, temperature=1.5))
        generator.end_rollout()
        for prompt, ids, logprobs in zip(PROMPTS, said.ids, said.logprobs, strict=True):
            assert logprobs == pytest.approx(scored(loaded.model, prompt, ids, 1.5), abs=1e-4)
        runs.shake(loaded.model, trainable_only=True)
        generator.weights_changed()
    assert len(engines) == 1
    assert bool(engines[0].arguments["hf_overrides"]) == ("model.max_length=8192" in words)


def test_an_adapter_is_handed_over_once_a_change(engines: list[Any]) -> None:
    generator, _ = made("adapter.r=5")
    generator.end_rollout()
    assert engines == []  # nothing starts before the first rollout
    for changed in (True, True, False):
        generator.begin_rollout()
        generator.generate(PROMPTS, GREEDY)
        generator.end_rollout()
        if changed:
            generator.weights_changed()
    (engine,) = engines
    new = ["reset_prefix_cache", ("wake_up", ["kv_cache"]), "generate", ("sleep", 1)]
    assert engine.events == [
        *("reset_prefix_cache", "generate", ("sleep", 1)),
        *(("wake_up", ["weights"]), *new),
        *(("wake_up", ["weights"]), *new),
    ]
    assert engine.lora[0] == 3
    given = engine.arguments
    assert (given["max_lora_rank"], given["load_format"], given["max_model_len"]) == (8, "auto", 1024 + 64)
    assert (given["logprobs_mode"], given["dtype"], given["seed"]) == ("processed_logprobs", "float32", 42)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_without_an_adapter_weights_are_dropped_and_given_again(engines: list[Any]) -> None:
    """Also where no step was between two rollouts."""
    generator, _ = made("adapter=full")
    for _ in range(2):
        generator.begin_rollout()
        generator.generate(PROMPTS, GREEDY)
        generator.end_rollout()
    given = ["reload_weights", "reset_prefix_cache"]
    assert engines[0].events == [
        *(*given, "generate", ("sleep", 2)),
        *(("wake_up", ["weights"]), *given, ("wake_up", ["kv_cache"]), "generate", ("sleep", 2)),
    ]
    assert not engines[0].arguments["enable_lora"]


def test_it_stays_awake_if_told_to(engines: list[Any]) -> None:
    generator, _ = made("generator.sleep=false", "memory=off")
    for _ in range(2):
        generator.begin_rollout()
        generator.generate(PROMPTS, GREEDY)
        generator.end_rollout()
    assert engines[0].events == ["reset_prefix_cache", "generate", "generate"]


def test_random_states_are_left_alone(engines: list[Any]) -> None:
    """vLLM seeds the process when it starts, in the midst of training."""
    generator, _ = made()
    before = torch.get_rng_state()
    generator.begin_rollout()
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_have_the_names_of_published_checkpoints(tmp_path: Path) -> None:
    """Experts are one tensor in transformers, and many in checkpoints; a tied head is not given."""
    from safetensors import safe_open

    from ftcore_generators._vllm_generator import published_weights

    for model in ("qwen3_moe", "smollm2"):
        loaded = runs.loaded([f"+model={model}", "model.tiny=true", "model.dtype=float32", "adapter=full"])
        folder = write_merged(loaded.model, loaded.tokenizer, tmp_path / model, dtype="float32")
        with safe_open(folder / "model.safetensors", "pt") as file:
            names = set(file.keys())
            given = dict(published_weights(loaded.model))
            assert set(given) == names
            assert all(torch.equal(given[name], file.get_tensor(name)) for name in names)


def test_a_longer_prompt_is_refused(engines: list[Any]) -> None:
    generator, _ = made("generator.max_length=12")
    with pytest.raises(Refused) as refused:
        generator.generate([[1] * 10], GREEDY)
    assert refused.value.problems[0].lines() == [
        "generator.max_length: 12 tokens do not hold a prompt of 10 and a completion of 8",
        "    fix: use generator.max_length=18, or shorter prompts",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["grpo", "ppo"])
def test_a_run_learns_from_its_completions(engines: list[Any], in_tmp: Path, trainer: str) -> None:
    words = ["trainer.max_steps=2", "trainer.max_completion_length=6", "trainer.global_batch=4", "prompts=[]"]
    ftcore.run([*TINY[:3], f"+trainer={trainer}", "generator=vllm", *words, "output_dir=run"])
    assert json.loads(Path("run/run.json").read_text())["status"] == "done"
    answers = 2  # to the sample prompts, before training and after
    assert engines[0].events.count("generate") == answers + (2 if trainer == "grpo" else 1)


REFUSED = [
    ("", "generator", "vllm needs a GPU, and there is none"),
    ("", "model.tiny", "has attention heads of 16 numbers, and vllm takes 32 or more"),
    ("+quantizer=bnb_nf4", "quantizer", "vllm is given plain weights, and those of bnb_nf4 are packed"),
    ("adapter.variant=dora", "adapter.variant", "vllm has no DoRA"),
    (
        "adapter.init=pissa",
        "adapter.init",
        "changes the weights under the adapter, which vllm reads from the checkpoint",
    ),
    (
        "adapter.modules_to_save=[lm_head]",
        "adapter.modules_to_save",
        "vllm takes low-rank matrices alone, and no module that is trained whole",
    ),
    (
        "model.new_tokens=['<x>']",
        "model.new_tokens",
        "vllm takes low-rank matrices alone, and no rows of the embedding",
    ),
    ("adapter.r=600", "adapter.r", "is 600, and vllm takes up to 512"),
    ("generator.memory_fraction=1.5", "generator.memory_fraction", "is 1.5"),
    ("generator.max_length=0", "generator.max_length", "is 0"),
    ("generator.max_sequences=0", "generator.max_sequences", "is 0"),
    ("generator.sleep=false", "generator.sleep", "vllm would keep memory that memory=auto counts as free"),
]


@pytest.mark.parametrize(("word", "key", "message"), REFUSED, ids=[f"{w or k}" for w, k, _ in REFUSED])
def test_what_the_plan_refuses(word: str, key: str, message: str) -> None:
    problems = {p.key: p for p in runs.refusals([*TINY, "generator=vllm", *([word] if word else [])])}
    assert problems[key].message == message
    assert problems[key].fix


@pytest.mark.parametrize(("model", "key"), [("qwen2_vl", "generator"), ("qwen3_moe", "adapter.targets")])
def test_models_that_the_plan_refuses(model: str, key: str) -> None:
    words = [f"+model={model}", "model.tiny=true", "+trainer=grpo", "generator=vllm"]
    assert any(p.key == key and "vllm is given" in p.message for p in runs.refusals(words))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    found = {p.message for p in runs.refusals([*TINY, "generator=vllm"])}
    assert "vllm completes the prompts of one process, and this run has several" in found


@pytest.mark.gpu
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_real_engine_agrees_with_the_model(adapter: str) -> None:  # pragma: no cover
    """Log-probabilities of sampled tokens, by vLLM's kernels and by transformers, in bfloat16."""
    pytest.importorskip("vllm")
    words = ["+model=smollm2", "model.shape=smollm2-135m", "+trainer=grpo", "generator=vllm", f"adapter={adapter}"]
    hooks, plan = runs.prepared(words)
    loaded = pipeline.load(hooks, plan)
    generator = hooks.first(h.ftcore_make_generator, plan=plan, model=loaded.model, tokenizer=loaded.tokenizer)
    for _ in range(2):
        generator.begin_rollout()
        said = generator.generate(PROMPTS, Sampling(max_new_tokens=16))
        generator.end_rollout()
        for prompt, ids, logprobs in zip(PROMPTS, said.ids, said.logprobs, strict=True):
            assert logprobs == pytest.approx(scored(loaded.model, prompt, ids, 1.0), abs=0.1)
        runs.shake(loaded.model, trainable_only=True)
        generator.weights_changed()
