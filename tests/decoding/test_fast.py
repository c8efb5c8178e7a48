"""The fast generator writes what transformers would, with the log-probabilities of a pass over everything."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generators_on_tiny import Both, both, logprobs_of, prompts_of
from transformers.generation import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ftcore import Sampling
from ftcore.guards.finite import NonFinite
from ftcore_generators.transformers import TransformersGenerator
from ftcore_kernels.decoding import layers
from ftcore_kernels.decoding.requests import Request
from ftcore_kernels.decoding.sampling import Sampler
from ftcore_kernels.layers.uncovered import Uncovered

GREEDY = Sampling(max_new_tokens=20, temperature=0.0)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi3", "smollm2"]


@pytest.fixture(scope="module")
def llama() -> Both:
    return both("kernels=[reference]")


@pytest.fixture(scope="module", params=["llama", "mixtral", "lfm2"])
def made(request: pytest.FixtureRequest) -> Both:
    """Layers computed by steps, those up to a mixture of experts, and layers of the family's own."""
    if request.param == "llama":
        return request.getfixturevalue("llama")  # type: ignore[no-any-return]
    return both("kernels=[reference]", family=request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_transformers_s(family: str) -> None:
    """With no kernel put into the layers; `test_coverage.py` has them with kernels, and more families."""
    made = both("kernels=[]", family=family)
    prompts = prompts_of(3, 17, 1, 64)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    assert not made.fast._said, "by steps"


@pytest.mark.parametrize("words", ["adapter=full", "+quantizer=bnb_nf4", "adapter.r=100", "adapter.variant=rslora"])
def test_whatever_is_trained(words: str) -> None:
    made = both(words)
    prompts = prompts_of(9, 4)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    assert not made.fast._said, "by steps"


def test_with_the_adapter_off(made: Both) -> None:
    prompts = prompts_of(9, 4)
    with made.model.disable_adapter():
        off = made.fast.generate(prompts, GREEDY).ids
        assert off == made.plain.generate(prompts, GREEDY).ids
    assert off != made.fast.generate(prompts, GREEDY).ids


def test_weights_and_adapters_that_change_between_calls(made: Both) -> None:
    prompts = prompts_of(9, 4)
    said = [made.fast.generate(prompts, GREEDY).ids]
    config = made.model.peft_config["default"]
    made.model.add_adapter("second", config)
    made.model.set_adapter("second")
    for change in range(2):
        with torch.no_grad():
            for name, weight in made.model.named_parameters():
                if "second" in name:
                    weight.normal_(std=0.2, generator=torch.Generator(weight.device).manual_seed(change))
        said.append(made.fast.generate(prompts, GREEDY).ids)
        assert said[-1] == made.plain.generate(prompts, GREEDY).ids
    made.model.set_adapter("default")
    made.model.delete_adapter("second")
    assert said[0] != said[1] != said[2]
    assert made.fast.generate(prompts, GREEDY).ids == said[0]


def test_a_large_batch_and_a_row_alone(made: Both) -> None:
    prompts = prompts_of(*range(1, 33)) * 8
    together = made.fast.generate(prompts, Sampling(max_new_tokens=4, temperature=0.0)).ids
    assert together == together[:32] * 8
    alone = [
        made.fast.generate([prompt], Sampling(max_new_tokens=4, temperature=0.0)).ids[0] for prompt in prompts[::9]
    ]
    assert alone == together[::9]


def test_prompts_without_tokens_and_none_at_all(made: Both) -> None:
    assert made.fast.generate([], GREEDY).ids == []
    with pytest.raises(ValueError, match="prompt 1 has no tokens: give one at least"):
        made.fast.generate([[5], [], [6]], GREEDY)
    with pytest.raises(ValueError, match="has no tokens: give one at least"):
        made.plain.generate([[5], [], [6]], GREEDY)


def test_a_completion_of_no_tokens(made: Both) -> None:
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        made.fast.generate([[5]], Sampling(max_new_tokens=0))


@pytest.mark.parametrize("plain", ["q_proj", "k_proj"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_some_of_the_weights_of_a_product_are_quantized(family: str, plain: str) -> None:
    """As in checkpoints that leave some modules out: no product of them together."""
    made = both("+quantizer=bnb_nf4", "adapter.targets=[o_proj]", family=family)
    for module in made.model.modules():
        if (base := getattr(module, plain, None)) is not None:
            weight = torch.randn(base.out_features, base.in_features, device=base.weight.device) / 8
            whole = torch.nn.Linear(base.in_features, base.out_features, bias=False, device=base.weight.device)
            whole.weight = torch.nn.Parameter(weight, requires_grad=False)
            setattr(module, plain, whole)
    prompts = prompts_of(9, 4, 17)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    made.model.train()
    ids = torch.tensor([prompts[2]], device=made.model.device)
    made.model(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in made.model.parameters())


def test_calls_from_several_threads_wait_for_each_other(llama: Both) -> None:
    prompts = [prompts_of(length) for length in (5, 30, 11, 64)]
    expected = [llama.fast.generate(prompt, GREEDY).ids for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert [one.ids for one in pool.map(partial(llama.fast.generate, sampling=GREEDY), prompts)] == expected


def test_whoever_is_shown_tokens_may_ask_for_others(llama: Both) -> None:
    prompt, found = prompts_of(9)[0], []
    expected = llama.fast.generate([prompt], GREEDY).ids[0]
    said = llama.fast.stream(prompt, GREEDY, lambda new: found.append(llama.fast.generate([prompt], GREEDY).ids[0]))
    assert found
    assert all(one == expected for one in (said, *found))


def test_parts_that_are_not_in_training_stay_so(llama: Both) -> None:
    llama.model.train()
    part = next(module for module in llama.model.modules() if isinstance(module, torch.nn.Embedding)).eval()
    modes = [module.training for module in llama.model.modules()]
    llama.fast.generate(prompts_of(4), GREEDY)
    assert [module.training for module in llama.model.modules()] == modes
    part.train()


def test_prompts_that_are_longer_than_a_pass(made: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(70, 3, 129, 9)
    monkeypatch.setattr(made.fast._config, "prompt_tokens", 16)
    monkeypatch.setattr(made.fast, "_engine", None)
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    made.fast._engine = None


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


@pytest.mark.parametrize(("temperature", "penalty"), [(0.0, 1.0), (0.7, 1.0), (1.0, 1.0), (0.0, 1.5), (0.7, 1.5)])
def test_log_probabilities_are_those_of_a_whole_pass(made: Both, temperature: float, penalty: float) -> None:
    """A penalty changes which tokens are drawn, and not how likely the model found them."""
    prompts = prompts_of(3, 30, 8)
    sampling = Sampling(max_new_tokens=16, temperature=temperature, repetition_penalty=penalty)
    found = made.fast.generate(prompts, sampling)
    assert found.logprobs is not None
    for prompt, said, logprobs in zip(prompts, found.ids, found.logprobs, strict=True):
        expected = logprobs_of(made.model, prompt, said, temperature or 1.0)
        assert float((torch.tensor(logprobs) - expected).abs().max()) < 1e-4


def test_rows_that_end_make_room_for_others(made: Both) -> None:
    """Two rows at a time, of mixed limits, some with one prompt: what comes out is the same as all at once."""
    fast = made.fast
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


def test_it_ends_with_the_end_token(made: Both) -> None:
    prompts = prompts_of(5) * 40
    engine: Any = made.fast._ready()
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


def test_a_penalty_is_reckoned_in_32_bits() -> None:
    """As transformers': of logits in 16 bits the largest may be another one."""
    from transformers import RepetitionPenaltyLogitsProcessor

    drawn = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(300, 4000, generator=drawn)).bfloat16()
    seen = torch.rand(logits.shape, generator=drawn) < 0.5
    sample = Sampler(
        Sampling(max_new_tokens=1, temperature=0.0, repetition_penalty=1.2), layers.op("draw", logits.device)
    )
    zeros = torch.zeros(len(logits), dtype=torch.int64)
    tokens, _ = sample(logits, zeros, zeros, seen)
    known = [torch.nonzero(row)[None, :, 0] for row in seen]
    chain = RepetitionPenaltyLogitsProcessor(1.2)
    expected = [int(chain(ids, row[None].float()).argmax()) for ids, row in zip(known, logits, strict=True)]
    assert tokens.tolist() == expected


@pytest.mark.parametrize("shown", [False, True])
def test_numbers_that_overflow_end_it(shown: bool) -> None:
    made = both("kernels=[reference]")
    with torch.no_grad():
        made.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFinite, match="overflow"):
        made.fast.stream([5, 6], GREEDY, lambda new: None) if shown else made.fast.generate(prompts_of(4, 9), GREEDY)


def test_nothing_is_left_on_the_layers(made: Both) -> None:
    def state() -> dict[str, Any]:
        return {
            name: (vars(module).keys(), vars(module).get("forward"), getattr(config, "_attn_implementation", None))
            for name, module in made.model.named_modules()
            for config in [getattr(module, "config", None)]
        }

    before = state()
    made.fast.generate(prompts_of(4), GREEDY)
    assert state() == before


def test_a_gpu_without_triton_leaves_it_to_transformers(llama: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "find_spec", lambda name: None)
    roles = llama.fast._plan.family.roles
    role = next(role for role in roles if role.name == "decoder_layer")
    assert layers.read(llama.fast._base, role, torch.device("cpu"))
    with pytest.raises(Uncovered, match="Triton is not installed"):
        layers.read(llama.fast._base, role, torch.device("cuda"))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_memory_is_given_back(family: str) -> None:
    made = both("kernels=[triton]", "model.dtype=bfloat16", family=family)
    prompts, sizes = prompts_of(30, 50) * 16, set()
    for turn in range(30):
        made.fast.generate(prompts, Sampling(max_new_tokens=40))
        if turn > 2:
            sizes.add((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(sizes) == 1


def test_what_is_not_asked_for_is_not_the_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint's own `min_p` would leave the likeliest token alone."""
    made, prompts = both(), prompts_of(9) * 8
    monkeypatch.setattr(made.model.generation_config, "min_p", 0.9999)
    for generator in (made.fast, made.plain):
        found = generator.generate(prompts, Sampling(max_new_tokens=6))
        assert len(set(map(tuple, found.ids))) > 1


LONG_ROPE = (
    "model.rope_scaling={rope_type: longrope, original_max_position_embeddings: 32, factor: 4.0, "
    "short_factor: [1.0, 1.3, 2.0, 3.0], long_factor: [1.5, 3.0, 6.0, 12.0]}"
)


def test_rows_whose_angles_change_on_the_way_are_left_to_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys that were computed with the short factors do not go with the long ones."""
    made = both("kernels=[reference]", LONG_ROPE, family="phi3")
    config = made.model.get_base_model().config
    # The family's own class puts its default over what was asked for.
    config.original_max_position_embeddings = config.rope_parameters["original_max_position_embeddings"] = 32
    short, long = prompts_of(5, 11), prompts_of(25, 40)
    assert made.fast.generate(short, GREEDY).ids == made.plain.generate(short, GREEDY).ids
    assert "transformers writes" not in capsys.readouterr().out
    assert made.fast.generate(long, GREEDY).ids == made.plain.generate(long, GREEDY).ids
    assert "beyond 32 LongRoPE turns all of them otherwise" in capsys.readouterr().out


def test_a_penalty_of_transformers_does_not_count_pads() -> None:
    """The pad may be the end token, and the shorter prompts would never end."""
    made, prompts = both("kernels=[reference]"), prompts_of(3, 9, 9, 4)
    favourite = made.plain.generate(prompts[:1], GREEDY).ids[0][0]
    plain = TransformersGenerator(made.model, SimpleNamespace(pad_token_id=favourite, eos_token_id=None), 64)  # type: ignore[arg-type]
    sampling = Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=1e9)
    together = plain.generate(prompts, sampling).ids
    assert together == [plain.generate([prompt], sampling).ids[0] for prompt in prompts]
    assert together == made.fast.generate(prompts, sampling).ids
