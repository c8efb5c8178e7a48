"""The fast generator writes what transformers would, with the log-probabilities of a pass over everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generators_on_tiny import Both, both, logprobs_of, prompts_of
from transformers.generation import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ftcore import Sampling
from ftcore_kernels.decoding import layers
from ftcore_kernels.decoding.requests import Request
from ftcore_kernels.layers.uncovered import Uncovered

GREEDY = Sampling(max_new_tokens=20, temperature=0.0)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "smollm2"]


@pytest.fixture(scope="module")
def llama() -> Both:
    return both("kernels=[reference]")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernels", ["kernels=[]", "kernels=[reference]"])
def test_greedy_tokens_are_transformers_s(family: str, kernels: str) -> None:
    made = both(kernels, family=family)
    prompts = prompts_of(3, 17, 1, 64)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    assert made.fast._engine is not None, "not by transformers itself"


@pytest.mark.parametrize("words", ["adapter=full", "+quantizer=bnb_nf4", "adapter.r=100", "adapter.variant=rslora"])
def test_whatever_is_trained(words: str) -> None:
    made = both(words)
    prompts = prompts_of(9, 4)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    assert made.fast._engine is not None


def test_with_the_adapter_off(llama: Both) -> None:
    prompts = prompts_of(9, 4)
    with llama.model.disable_adapter():
        off = llama.fast.generate(prompts, GREEDY).ids
        assert off == llama.plain.generate(prompts, GREEDY).ids
    assert off != llama.fast.generate(prompts, GREEDY).ids


def test_unpacked_4_bit_weights_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made = both("+quantizer=bnb_nf4")
    prompts = prompts_of(9, 4)
    packed = made.fast.generate(prompts, GREEDY)
    engine: Any = made.fast._engine
    monkeypatch.setattr(engine, "_limits", type(engine._limits)(8, 100, lambda: 2**30))
    unpacked = made.fast.generate(prompts, GREEDY)
    assert unpacked.ids == packed.ids
    assert unpacked.logprobs is not None and packed.logprobs is not None
    torch.testing.assert_close(torch.tensor(unpacked.logprobs[0]), torch.tensor(packed.logprobs[0]))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_log_probabilities_are_those_of_a_whole_pass(llama: Both, temperature: float) -> None:
    prompts = prompts_of(3, 30, 8)
    found = llama.fast.generate(prompts, Sampling(max_new_tokens=16, temperature=temperature))
    assert found.logprobs is not None
    for prompt, said, logprobs in zip(prompts, found.ids, found.logprobs, strict=True):
        expected = logprobs_of(llama.model, prompt, said, temperature or 1.0)
        assert float((torch.tensor(logprobs) - expected).abs().max()) < 1e-4


def test_rows_that_end_make_room_for_others(llama: Both) -> None:
    """Two rows at a time, of mixed limits, some with one prompt: what comes out is the same as all at once."""
    fast = llama.fast
    prompts = prompts_of(3, 17, 1, 40, 8)
    prompts += [prompts[1], prompts[1]]
    requests = [Request(at, tuple(prompt), 1 + 3 * at, at) for at, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=0, temperature=0.9)
    engine: Any = fast._ready()
    together = engine.run(requests, sampling, [])
    assert [len(ids) for ids in together.ids] == [1 + 3 * at for at in range(len(prompts))]
    for rows, tokens in ((2, 20), (1, 1), (3, 100)):
        engine._limits = type(engine._limits)(rows, tokens)
        assert engine.run(requests, sampling, []).ids == together.ids
    engine.close()
    fast._engine = None


def test_a_seed_governs_all_draws(llama: Both) -> None:
    prompts, sampling = prompts_of(5, 5), Sampling(max_new_tokens=12)
    torch.manual_seed(3)
    one = llama.fast.generate(prompts * 2, sampling).ids
    torch.manual_seed(3)
    assert llama.fast.generate(prompts * 2, sampling).ids == one
    assert llama.fast.generate(prompts * 2, sampling).ids != one
    assert one[0] != one[2], "a group's completions differ"


def test_it_ends_with_the_end_token(llama: Both) -> None:
    prompts = prompts_of(5) * 40
    engine: Any = llama.fast._ready()
    ends = list(range(100, 130))
    requests = [Request(at, tuple(prompt), 30, at) for at, prompt in enumerate(prompts)]
    found = engine.run(requests, Sampling(max_new_tokens=30), ends)
    engine.close()
    assert any(len(ids) < 30 for ids in found.ids)
    assert all(ids[-1] in ends for ids in found.ids if len(ids) < 30)
    assert not any(token in ends for ids in found.ids for token in ids[:-1])


SAMPLINGS = {
    "temperature": {"temperature": 1.7},
    "top_k": {"top_k": 6, "temperature": 2.0},
    "top_p": {"top_p": 0.6, "temperature": 1.5},
    "min_p": {"min_p": 0.3, "temperature": 1.5},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.1, "temperature": 1.2},
    "penalty": {"repetition_penalty": 3.0},
}


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_are_drawn_from_transformers_s_distribution(llama: Both, name: str) -> None:
    """Chi-square of 6,000 first tokens against the probabilities that transformers' processors leave."""
    sampling = Sampling(max_new_tokens=1, **SAMPLINGS[name])
    [prompt], number = prompts_of(12), 6000
    torch.manual_seed(0)
    engine: Any = llama.fast._ready()
    engine._limits = type(engine._limits)(number, 8192)
    found = engine.run([Request(at, tuple(prompt), 1, at * 7919) for at in range(number)], sampling, []).ids
    engine.close()
    llama.fast._engine = None
    with torch.no_grad():
        logits = (
            llama.model.eval()(input_ids=torch.tensor([prompt], device=llama.model.device)).logits[:, -1].float().cpu()
        )
    chances = _chances(sampling, prompt, logits)
    counts = torch.bincount(torch.tensor(found)[:, 0], minlength=len(chances))
    assert not counts[chances == 0].any(), "a token that is left out"
    common = chances * number >= 8
    observed = torch.cat((counts[common], counts[~common].sum()[None])).double()
    expected = torch.cat((chances[common], chances[~common].sum()[None])).double() * number
    kept = expected > 0
    chi_square = float(((observed - expected)[kept] ** 2 / expected[kept]).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 6


def _chances(sampling: Sampling, prompt: list[int], logits: torch.Tensor) -> torch.Tensor:
    from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

    chain = LogitsProcessorList([
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        TopPLogitsWarper(sampling.top_p),
        *([MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
    ])  # fmt: skip
    return chain(torch.tensor([prompt]), logits)[0].softmax(-1)


def test_a_penalty_counts_what_was_written(llama: Both) -> None:
    """As transformers' own, token for token."""
    sampling = Sampling(max_new_tokens=20, temperature=0.0, repetition_penalty=2.0)
    prompts = prompts_of(6, 11)
    ours = llama.fast.generate(prompts, sampling).ids
    from transformers import GenerationConfig

    for prompt, said in zip(prompts, ours, strict=True):
        settings = GenerationConfig(
            max_new_tokens=20, do_sample=False, repetition_penalty=2.0, pad_token_id=0, eos_token_id=None
        )
        asked = torch.tensor([prompt], device=llama.model.device)
        out = llama.model.generate(input_ids=asked, generation_config=settings)
        theirs = out[0, len(prompt) :].tolist()
        assert said == theirs[: len(said)]


def test_nothing_is_left_on_the_layers(llama: Both) -> None:
    before = {name: vars(module).get("forward") for name, module in llama.model.named_modules()}
    llama.fast.generate(prompts_of(4), GREEDY)
    assert {name: vars(module).get("forward") for name, module in llama.model.named_modules()} == before


@pytest.mark.parametrize("family", ["qwen3_moe", "lfm2"])
def test_others_are_completed_by_transformers_and_told_why(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = both(family=family)
    prompts = prompts_of(5, 9)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    assert "because" in (said := capsys.readouterr().out) and "no plain gated MLP" in said
    made.fast.generate(prompts, GREEDY)
    assert "transformers writes" not in capsys.readouterr().out, "once is enough"


def test_dora_is_not_computed_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    made = both("adapter.variant=dora")
    made.fast.generate(prompts_of(5), GREEDY)
    assert "a LoRA variant is active" in capsys.readouterr().out


def test_a_gpu_without_triton_leaves_it_to_transformers(llama: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    roles = llama.fast._plan.family.roles
    role = next(role for role in roles if role.name == "decoder_layer")
    assert layers.read(llama.fast._base, role, torch.device("cpu"))
    with pytest.raises(Uncovered, match="Triton is not installed"):
        layers.read(llama.fast._base, role, torch.device("cuda"))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_write_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = both(family=family)
    prompts = prompts_of(3, 17, 1, 64)
    recorded = made.fast.generate(prompts, GREEDY)
    monkeypatch.setattr("ftcore_kernels.decoding.engine.recordable", lambda *_: False)
    assert made.fast.generate(prompts, GREEDY).ids == recorded.ids == made.plain.generate(prompts, GREEDY).ids


@pytest.mark.gpu
@ON_GPU
def test_memory_is_given_back() -> None:
    made = both("kernels=[triton]")
    prompts, sizes = prompts_of(30, 50) * 16, set()
    for turn in range(30):
        made.fast.generate(prompts, Sampling(max_new_tokens=40))
        if turn > 2:
            sizes.add((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(sizes) == 1
