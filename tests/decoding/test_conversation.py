"""A conversation's turn reads what is new of it, and is answered as if all of it had been read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generators_on_tiny import Both, both, prompts_of

from ftcore import Sampling
from ftcore.answers import Answers
from ftcore.config import SamplingConfig
from ftcore.specs import Conversing, Streaming
from ftcore.testing import runs
from ftcore_generators.fast import FastGenerator
from ftcore_kernels.decoding import prompts as reading
from ftcore_kernels.decoding.cache import Cache
from ftcore_kernels.decoding.engine import Engine
from ftcore_kernels.decoding.recording import fixed_rope
from ftcore_kernels.reference.decode_attention import Scores, decode_attention

GREEDY = Sampling(max_new_tokens=12, temperature=0.0)
FAMILIES = ("llama", "gemma3", "gpt_oss", "llama4", "deepseek_v3")
"""All tokens are seen; a window of 8; the same, with sinks and by the layers' own modules; chunks; latent attention."""
OTHERS = (
    "gemma", "gemma2", "gemma3_vision", "gemma3n", "mistral", "mixtral", "mllama", "orpheus", "phi3", "pixtral",
    "qwen2", "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_moe", "qwen3_vl", "smollm2",
)  # fmt: skip
SLOWLY = [pytest.param(family, marks=pytest.mark.slow) for family in OTHERS]


class Read(list[int]):
    """Tokens of each pass over a prompt."""

    def taken(self) -> list[int]:
        found = list(self)
        self.clear()
        return found


@pytest.fixture(scope="module")
def llama() -> Both:
    return both("kernels=[reference]")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    found, logits = Read(), Engine.logits

    def counted(self: Engine, ids: torch.Tensor, positions: Any, **options: Any) -> torch.Tensor:
        if "logits_to_keep" in options:
            found.append(ids.shape[1])
        return logits(self, ids, positions, **options)

    monkeypatch.setattr(Engine, "logits", counted)
    return found


def silent(new: list[int]) -> None:
    """Shows nothing."""


def fresh(made: Both, prompt: Sequence[int], sampling: Sampling = GREEDY) -> list[int]:
    """By a generator that has read nothing."""
    fast = made.fast
    return FastGenerator(fast._plan, fast._config, made.model, fast._tokenizer).stream(prompt, sampling, silent)


def begun(made: Both, length: int = 30) -> tuple[Streaming, list[int]]:
    """A conversation, and all its ids after a first turn."""
    made.fast.end_rollout()
    talk, [prompt] = made.fast.conversation(), prompts_of(length)
    return talk, prompt + talk.stream(prompt, GREEDY, silent)


def four_turns(made: Both, read: Read) -> None:
    talk, ids, known, turns = made.fast.conversation(), list[int](), 0, []
    for asked in prompts_of(21, 1, 5, 40):
        ids += asked
        written = talk.stream(ids, GREEDY, silent)
        assert read.taken() == [len(ids) - known]
        turns.append((list(ids), written))
        ids += written
        known = len(ids) - 1
    for prompt, written in turns:  # only now: a pass of another's may write to weights, and so drop what is kept
        assert written == fresh(made, prompt) == made.plain.generate([prompt], GREEDY).ids[0]
    assert not [what for what in made.fast._said if what.startswith("transformers")]


@pytest.mark.parametrize("family", [*FAMILIES, *SLOWLY])
def test_four_turns_are_read_once(family: str, read: Read) -> None:
    made = both("kernels=[reference]", family=family)
    if family == "llama4":
        made.fast._base.config.attention_chunk_size = 8
    assert isinstance(made.fast, Conversing)
    four_turns(made, read)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_four_turns_with_recorded_steps(family: str, read: Read) -> None:
    four_turns(both(family=family), read)


def test_a_state_that_cannot_be_cut_is_not_kept(read: Read) -> None:
    made = both("kernels=[reference]", family="lfm2")
    talk, ids = begun(made)
    assert made.fast._kept is not None
    assert made.fast._kept.cache is None, "nor its memory"
    read.clear()
    ids += prompts_of(4)[0]
    written = talk.stream(ids, GREEDY, silent)
    assert read.taken() == [len(ids)]
    assert written == fresh(made, ids)


KINDS = {"default": True, "yarn": True, "dynamic": False, "longrope": False}


@pytest.mark.parametrize(("kind", "fixed"), KINDS.items())
def test_keys_that_depend_on_the_row_s_length_are_not_kept(
    kind: str, fixed: bool, read: Read, llama: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = llama.fast._base.config
    monkeypatch.setitem(config.rope_parameters, "rope_type", kind)
    assert fixed_rope(config) is fixed
    talk, ids = begun(llama)
    read.clear()
    talk.stream(ids, GREEDY, silent)
    assert read.taken() == [1 if fixed else len(ids)]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("same", [0, 1, 13, 30])
def test_what_is_rendered_otherwise_is_read_again(family: str, same: int, read: Read) -> None:
    """From the first other id on, also where the tokens behind it are the old ones; shorter than it was, too."""
    made = both("kernels=[reference]", family=family)
    talk, ids = begun(made)
    for other in ([*ids[:same], (ids[same] + 1) % 256, *ids[same + 1 :], *prompts_of(9)[0]], ids[: same + 1]):
        read.clear()
        assert talk.stream(other, GREEDY, silent) == fresh(made, other)
        assert read.taken()[0] == len(other) - same
        talk, ids = begun(made)


def test_the_last_token_is_read_in_any_case(read: Read, llama: Both) -> None:
    talk, ids = begun(llama)
    read.clear()
    first = talk.stream(ids, GREEDY, silent)
    assert talk.stream(ids, GREEDY, silent) == first == fresh(llama, ids)
    assert read.taken()[:2] == [1, 1]


def test_a_penalty_counts_what_was_kept_too(llama: Both) -> None:
    talk, ids = begun(llama)
    sampling = Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=2.0)
    assert talk.stream(ids, sampling, silent) == fresh(llama, ids, sampling)


# Dropped --------------------------------------------------------------------------------------------------------------


def rewritten(made: Both) -> None:
    """Without a word to the generator."""
    runs.shake(made.model, trainable_only=True)


def with_another_adapter(made: Both) -> None:
    made.model.add_adapter("second", made.model.peft_config["default"])
    made.model.set_adapter("second")


def without_adapter(made: Both) -> None:
    made.model.base_model.disable_adapter_layers()


USES: dict[str, Callable[[Both], object]] = {
    "changed weights": lambda made: made.fast.weights_changed(),
    "rewritten weights": rewritten,
    "another adapter": with_another_adapter,
    "no adapter": without_adapter,
    "a rollout": lambda made: made.fast.begin_rollout(),
    "its end": lambda made: made.fast.end_rollout(),
    "a batch": lambda made: made.fast.generate(prompts_of(4), GREEDY),
    "a stream": lambda made: made.fast.stream(prompts_of(4)[0], GREEDY, silent),
}


@pytest.mark.parametrize("use", USES)
def test_another_use_drops_what_was_kept(use: str, read: Read) -> None:
    made = both("kernels=[reference]")
    talk, ids = begun(made)
    USES[use](made)
    read.clear()
    assert talk.stream(ids, GREEDY, silent) == fresh(made, ids)
    assert read.taken()[0] == len(ids)


def test_nothing_is_kept_without_a_conversation(llama: Both) -> None:
    for use in ("changed weights", "a rollout", "its end", "a batch", "a stream"):
        begun(llama)
        assert llama.fast._kept is not None
        USES[use](llama)
        assert llama.fast._kept is None


def test_what_transformers_writes_is_not_kept(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    made = both("kernels=[reference]")
    talk, ids = begun(made)
    monkeypatch.setattr(made.fast, "_covered", False)
    written = talk.stream(ids, GREEDY, silent)
    assert made.fast._kept is None
    monkeypatch.undo()
    assert written == fresh(made, ids)


# Within another ------------------------------------------------------------------------------------------------------

LONGER = Sampling(max_new_tokens=24, temperature=0.0)
WITHIN: dict[str, Callable[[Both, Streaming, list[int]], object]] = {
    "another turn": lambda made, talk, ids: talk.stream(ids, GREEDY, silent),
    "another conversation": lambda made, talk, ids: made.fast.conversation().stream(ids, GREEDY, silent),
    "a stream": lambda made, talk, ids: made.fast.stream(ids, GREEDY, silent),
    "a batch": lambda made, talk, ids: made.fast.generate([ids], GREEDY).ids[0],
}


@pytest.mark.parametrize("same", [0, 20])
@pytest.mark.parametrize("use", WITHIN)
def test_who_is_shown_tokens_may_ask_for_others(use: str, same: int, llama: Both) -> None:
    """As for a call of a tool: both are answered right, and so are the turns that come after them."""
    talk, ids = begun(llama)
    ids += prompts_of(3)[0]
    other, answers = [*ids[:same], *prompts_of(70)[0]], []
    expected = [fresh(llama, ids, LONGER), fresh(llama, other)]

    def ask(new: list[int]) -> None:
        if not answers:
            answers.append(WITHIN[use](llama, talk, other))

    assert [talk.stream(ids, LONGER, ask), *answers] == expected
    for turn in (ids + expected[0] + prompts_of(5)[0], other + expected[1] + prompts_of(5)[0]):
        assert talk.stream(turn, GREEDY, silent) == fresh(llama, turn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("use", WITHIN)
def test_who_is_shown_tokens_of_recorded_steps_may_ask_for_others(use: str) -> None:
    """The launches that are replayed read memory of their own."""
    test_who_is_shown_tokens_may_ask_for_others(use, 0, both())


# Ended half way -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_answer_that_is_ended_is_kept_as_far_as_it_was_shown(family: str, read: Read) -> None:
    made = both("kernels=[reference]", family=family)
    talk, ids = begun(made)
    shown: list[int] = []

    def enough(new: list[int]) -> None:
        shown.extend(new)
        if len(shown) >= 5:
            raise KeyboardInterrupt

    ids += prompts_of(3)[0]
    with pytest.raises(KeyboardInterrupt):
        talk.stream(ids, Sampling(max_new_tokens=40, temperature=0.0), enough)
    read.clear()
    ids += [*shown, *prompts_of(6)[0]]
    assert talk.stream(ids, GREEDY, silent) == fresh(made, ids)
    assert read.taken()[0] == 1 + 6, "the last token that was shown, and what was asked"


@pytest.mark.parametrize("where", ["logits", "lengthen", "write"])
@pytest.mark.parametrize("passed", [0, 1, 4])
def test_what_fails_half_way_leaves_what_is_right(
    where: str, passed: int, llama: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk, ids = begun(llama)
    ids += prompts_of(50)[0]
    owner: Any = Engine if where == "logits" else Cache
    real, left = getattr(owner, where), [passed]

    def failing(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as broken, suppress(KeyboardInterrupt):
        broken.setattr(owner, where, failing)
        talk.stream(ids, GREEDY, silent)
    assert talk.stream(ids, GREEDY, silent) == fresh(llama, ids)


def test_a_step_that_is_tried_before_it_is_recorded_writes_to_nothing_that_is_kept(
    llama: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tried(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step

    talk, ids = begun(llama)
    monkeypatch.setattr("ftcore_kernels.decoding.run.recorded", tried)
    monkeypatch.setattr(llama.fast._engine, "may_record", True)
    for asked in prompts_of(1, 7):
        ids += asked
        written = talk.stream(ids, GREEDY, silent)
        assert written == fresh(llama, ids)
        ids += written


# Attention ------------------------------------------------------------------------------------------------------------

SCORES = [Scores(0.3), Scores(0.3, window=5), Scores(0.3, softcap=2.0), Scores(0.3, chunk=4), Scores(0.3, 3, 2.0)]


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("at_once", [1, 300, 10**6])
def test_the_rest_of_a_prompt_is_read_as_if_token_by_token(
    scores: Scores, sinks: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "AT_ONCE", at_once)
    drawn, length = torch.Generator().manual_seed(3), 19
    q, k, v = (torch.randn((1, heads, length, 8), generator=drawn) for heads in (4, 2, 2))
    scores = scores._replace(sinks=torch.randn(4, generator=drawn) if sinks else None)
    keys, values = torch.zeros((2, 1, 2, length, 8))
    steps = [
        decode_attention(*(x[:, :, at, None] for x in (q, k, v)), keys, values, torch.tensor([at]), scores)
        for at in range(length)
    ]
    for known in (1, 4, 8, 11, 18):
        found = reading.behind(q[:, :, known:], k, v, scores)
        torch.testing.assert_close(found, torch.cat(steps[known:], 1), rtol=1e-5, atol=1e-5)


# `ftcore chat` --------------------------------------------------------------------------------------------------------

LOUD = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content if m.role == 'user' else m.content | upper }}\n{% endfor %}"
    "<assistant>"
)
"""Writes an answer otherwise once the talk goes on."""


@pytest.mark.parametrize("template", [None, LOUD])
def test_a_talk_reads_what_is_new(
    template: str | None, read: Read, llama: Both, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, settings = llama.plain._tokenizer, SamplingConfig(max_new_tokens=16)
    if template:
        monkeypatch.setattr(tokenizer, "chat_template", template)
    told, afresh = (Answers(g, llama.model, tokenizer, settings) for g in (llama.fast, llama.plain))
    talk: list[dict[str, str]] = []
    with told.talking():
        for turn, asked in enumerate(("Why is the sky blue?", "Hi", "Name three rivers.", "And lakes?")):
            talk.append({"role": "user", "content": asked})
            said = told.next(talk, lambda text: None)
            assert said == afresh.next(talk, lambda text: None)
            whole, [new] = len(told._asked(talk)), read.taken()
            assert new == whole if turn == 0 else new < whole - 20, (new, whole)
            talk.append({"role": "assistant", "content": said})
        assert llama.fast._kept is not None
    assert llama.fast._kept is None, "its memory is given back"


def test_a_generator_that_keeps_nothing_is_asked_as_ever(llama: Both) -> None:
    heard: list[int] = []
    plain: Any = SimpleNamespace(
        begin_rollout=lambda: None,
        end_rollout=lambda: None,
        stream=lambda ids, sampling, show: heard.append(len(ids)),
    )
    told = Answers(plain, llama.model, llama.plain._tokenizer, SamplingConfig())
    with told.talking():
        told.next([{"role": "user", "content": "Hi"}], lambda text: None)
    assert heard == [len(told._asked([{"role": "user", "content": "Hi"}]))]
