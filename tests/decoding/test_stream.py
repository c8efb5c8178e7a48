"""Generators that show what they write, and answers by the run's generator: transformers' own, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generators_on_tiny import Both, both, prompts_of
from transformers import GenerationConfig

from ftcore import Completions, Refused, Sampling, checkpoint
from ftcore.answers import Answers, end_ids, evaluating
from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.catalog import installed
from ftcore.chat import render
from ftcore.config import SamplingConfig
from ftcore.specs import Streaming
from ftcore_kernels.decoding.engine import Engine
from ftcore_kernels.layers.uncovered import Uncovered

GREEDY = Sampling(max_new_tokens=20, temperature=0.0)
ASKED = ("Why is the sky blue?", "Hi", "Name three rivers, and where they end.")
SETTINGS = SamplingConfig(max_new_tokens=24)
BUNDLE = installed().find("model", "smollm2").load().ftcore_model_family().bundle
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def llama() -> Both:
    return both("kernels=[reference]")


def answers(made: Both, generator: Any, settings: SamplingConfig = SETTINGS) -> Answers:
    return Answers(generator, made.model, made.plain._tokenizer, settings)


def by_transformers(made: Both, settings: SamplingConfig, continues: bool = False) -> list[str]:
    """One prompt after the other through `model.generate`, with what the checkpoint says of its own."""
    tokenizer, said = made.plain._tokenizer, []
    for prompt in ASKED:
        text = prompt if continues else render(tokenizer, [{"role": "user", "content": prompt}], generate=True)
        given = tokenizer(text, add_special_tokens=continues, return_tensors="pt").to(made.model.device)
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            eos_token_id=end_ids(made.model, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        with evaluating(made.model), torch.no_grad():
            out = made.model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"], generation_config=config
            )
        said.append(tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return said


@pytest.mark.parametrize("which", ["fast", "plain"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_is_shown_is_what_is_written(llama: Both, which: str, temperature: float) -> None:
    generator: Any = getattr(llama, which)
    assert isinstance(generator, Streaming)
    sampling = Sampling(max_new_tokens=20, temperature=temperature)
    for prompt in prompts_of(3, 40):
        shown: list[list[int]] = []
        torch.manual_seed(0)
        whole = generator.stream(prompt, sampling, shown.append)
        torch.manual_seed(0)
        assert whole == generator.generate([prompt], sampling).ids[0]
        assert [token for piece in shown for token in piece] == whole
        assert len(shown) > 1, "not all at the end"
        assert all(shown)


@pytest.mark.parametrize("which", ["fast", "plain"])
def test_what_is_raised_ends_it_and_nothing_else(llama: Both, which: str) -> None:
    generator, [prompt] = getattr(llama, which), prompts_of(9)
    expected = generator.generate([prompt], GREEDY).ids
    before = {name: vars(module).get("forward") for name, module in llama.model.named_modules()}
    llama.model.train()
    shown: list[int] = []

    def twice(new: Sequence[int]) -> None:
        shown.extend(new)
        if len(shown) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.stream(prompt, GREEDY, twice)
    assert 2 <= len(shown) < 20
    assert llama.model.training
    assert {name: vars(module).get("forward") for name, module in llama.model.named_modules()} == before
    assert generator.generate([prompt], GREEDY).ids == expected


def test_memory_is_given_back_also_when_it_is_ended(llama: Both) -> None:
    [prompt] = prompts_of(5)
    llama.fast.stream(prompt, GREEDY, lambda new: None)
    engine = llama.fast._engine
    assert engine is not None
    assert engine._layers is None
    with pytest.raises(ZeroDivisionError):
        llama.fast.stream(prompt, GREEDY, lambda new: 1 // 0)
    assert engine._layers is None


def test_what_is_not_computed_here_is_shown_by_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, [prompt] = both(), prompts_of(9)

    def declined(self: Engine) -> None:
        raise Uncovered("it is Tuesday")

    monkeypatch.setattr(Engine, "open", declined)
    for _ in range(2):
        shown: list[list[int]] = []
        assert made.fast.stream(prompt, GREEDY, shown.append) == made.plain.generate([prompt], GREEDY).ids[0]
        assert len(shown) > 1
    assert capsys.readouterr().out.count("because it is Tuesday") == 1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("continues", [False, True])
def test_answers_are_transformers_s(family: str, continues: bool) -> None:
    """All prompts at once, of different lengths, by both generators."""
    made = both(family=family)
    expected = by_transformers(made, SETTINGS, continues)
    assert any(expected), "they say something"
    assert answers(made, made.fast).to(ASKED, continues) == expected
    assert made.fast._engine is not None, "not by transformers itself"
    assert answers(made, made.plain).to(ASKED, continues) == expected


def test_what_the_checkpoint_says_of_sampling_counts(llama: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does in `generate`: many checkpoints come with a penalty."""
    plain = by_transformers(llama, SETTINGS)
    monkeypatch.setattr(llama.model.generation_config, "repetition_penalty", 1.5)
    expected = by_transformers(llama, SETTINGS)
    assert expected != plain
    assert answers(llama, llama.fast).to(ASKED) == expected
    assert answers(llama, llama.plain).to(ASKED) == expected


@pytest.mark.parametrize(("own", "expected"), [({}, (50, 0.0)), ({"top_k": 20, "min_p": 0.1}, (20, 0.1))])
def test_tokens_are_drawn_as_generate_draws_them(own: dict[str, Any], expected: tuple[int, float]) -> None:
    heard: list[Sampling] = []
    model: Any = SimpleNamespace(generation_config=GenerationConfig(**own), device=torch.device("cpu"))
    settings = SamplingConfig(max_new_tokens=7, temperature=0.6, top_p=0.9)
    tokenizer: Any = both().plain._tokenizer
    Answers(Recorded(heard), model, tokenizer, settings).to(["Hi"])
    [sampling] = heard
    assert (sampling.top_k, sampling.min_p) == expected
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (7, 0.6, 0.9)
    assert sampling.repetition_penalty == 1.0


class Recorded:
    """Writes "ho, ho" to everything, and cannot show it before it is whole."""

    def __init__(self, heard: list[Sampling]) -> None:
        self.heard, self.calls = heard, list[str]()

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        self.heard.append(sampling)
        self.calls.append(f"generate {len(prompt_ids)}")
        return Completions(ids=[byte_tokenizer()("ho, ho")["input_ids"] for _ in prompt_ids])

    def begin_rollout(self) -> None:
        self.calls.append("begin")

    def end_rollout(self) -> None:
        self.calls.append("end")

    def weights_changed(self) -> None:
        """Nothing to do."""


def test_all_prompts_are_written_at_once_between_the_calls_about_memory(llama: Both) -> None:
    generator = Recorded([])
    told = answers(llama, generator)
    assert len(told.to(ASKED)) == 3
    assert generator.calls == ["begin", "generate 3", "end"]
    assert told.to([]) == []
    assert len(generator.calls) == 3, "nobody is asked for nothing"


def test_a_generator_that_shows_nothing_is_shown_as_a_whole(llama: Both) -> None:
    shown: list[str] = []
    generator = Recorded([])
    assert not isinstance(generator, Streaming)
    told = answers(llama, generator)
    talk = [{"role": "user", "content": "Hi"}]
    assert told.next(talk, shown.append) == "".join(shown) == "ho, ho"


def test_without_a_generator_the_fix_is_said(llama: Both) -> None:
    with pytest.raises(Refused, match="use generator=fast"):
        answers(llama, None).to(["Hi"])
    assert answers(llama, None).to([]) == []


def test_a_conversation_is_shown_as_it_is_answered(llama: Both) -> None:
    told = answers(llama, llama.fast)
    for prompt, expected in zip(ASKED, by_transformers(llama, SETTINGS), strict=True):
        shown: list[str] = []
        said = told.next([{"role": "user", "content": prompt}], shown.append)
        assert "".join(shown) == said == expected.rstrip("\ufffd").rstrip()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(checkpoint.bundled_file(BUNDLE) is None, reason=BUNDLE.install)
def test_smollm2_answers_and_shows_as_transformers_does() -> None:
    """The real weights, fp32, with an adapter that does something and without it."""
    made = both("model.tiny=false", family="smollm2")
    settings = SamplingConfig(max_new_tokens=32)
    with made.model.disable_adapter():
        expected = by_transformers(made, settings)
        assert answers(made, made.fast, settings).to(ASKED) == expected
        told = answers(made, made.fast, settings)
        for prompt, whole in zip(ASKED, expected, strict=True):
            shown: list[str] = []
            assert told.next([{"role": "user", "content": prompt}], shown.append) == whole
            assert sum(map(bool, shown)) >= min(2, len(whole.split())), "more than a word does not come at once"
    assert answers(made, made.fast, settings).to(ASKED) == by_transformers(made, settings)


@pytest.mark.gpu
@ON_GPU
def test_answers_leave_no_memory_behind() -> None:
    """Beyond what cuBLAS keeps for the stream on which steps are tried."""
    made = both("kernels=[triton]")
    torch.cuda.empty_cache()
    before, sizes = torch.cuda.memory_reserved(), set()
    for turn in range(4):
        answers(made, made.fast).to(ASKED)
        if turn:
            sizes.add((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(sizes) == 1
    assert sizes.pop()[1] - before <= 80 * 2**20


@pytest.mark.parametrize(("first", "begins"), [(None, 2), (7, 7)])
def test_an_empty_text_is_continued_from_the_first_token(first: int | None, begins: int) -> None:
    class Tokenizer:
        chat_template, bos_token_id, eos_token_id = None, first, 2

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    asked = Answers(None, None, Tokenizer(), SETTINGS)  # type: ignore[arg-type]
    assert asked._asked([{"role": "user", "content": ""}]) == [begins]
    assert asked._asked([{"role": "user", "content": "A"}]) == [65]
