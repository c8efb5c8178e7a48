"""Completions for which the memory is not there are written in smaller parts: the same tokens, and said once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generators_on_tiny import Both, both, prompts_of

from ftcore import Sampling
from ftcore.guards.memory import NoMemory
from ftcore_kernels.decoding.engine import Engine

DRAWN = Sampling(max_new_tokens=8, temperature=1.0)
GREEDY = Sampling(max_new_tokens=8, temperature=0.0)
SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nand more of it")


@pytest.fixture
def made() -> Both:
    return both("kernels=[reference]")


def room_for(most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """No more rows than that fit the engine's cache; the list grows by those of every cache."""
    own, asked = Engine.cache, []

    def cache(self: Engine, length: int, wanted: int) -> Any:
        found = own(self, length, wanted)
        asked.append(found.rows)
        if found.rows > most:
            raise SHORT
        return found

    monkeypatch.setattr(Engine, "cache", cache)
    return asked


def test_half_as_many_until_they_fit(made: Both, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """And no more are tried afterwards; the completions are those of the seeds, whoever is written beside them."""
    prompts = prompts_of(*range(3, 19))
    torch.manual_seed(0)
    expected = made.fast.generate(prompts, DRAWN)
    asked = room_for(5, monkeypatch)
    torch.manual_seed(0)
    found = made.fast.generate(prompts, DRAWN)
    assert found.ids == expected.ids
    assert asked == [16, 8, 4]
    said = capsys.readouterr().out
    assert "out of memory with 16 completions at a time; going on with 8 (generator.batch=8 spares the attempt)" in said
    assert made.fast.generate(prompts, GREEDY).ids == made.plain.generate(prompts, GREEDY).ids
    assert asked == [16, 8, 4, 4]
    assert "out of memory" not in capsys.readouterr().out


def test_a_step_that_does_not_fit_is_recorded_with_fewer(made: Both, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Lack of memory says nothing against recording."""
    prompts, tried = prompts_of(*range(3, 11)), []
    long = Sampling(max_new_tokens=12, temperature=0.0)
    expected = made.fast.generate(prompts, long)

    def recorded(step: Any) -> Any:
        tried.append(step)
        if len(tried) == 1:
            raise SHORT
        return step

    own = Engine.open
    monkeypatch.setattr(Engine, "open", lambda self: (own(self), setattr(self, "may_record", True)))
    monkeypatch.setattr("ftcore_kernels.decoding.run.recorded", recorded)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert made.fast.generate(prompts, long).ids == expected.ids
    said = capsys.readouterr().out
    assert "out of memory with 8 completions at a time; going on with 4" in said
    assert "cannot be recorded" not in said
    assert len(tried) == 2


def test_one_that_does_not_fit_ends_in_a_message(made: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    room_for(0, monkeypatch)
    with pytest.raises(
        NoMemory, match=r"while one completion was written: CUDA out of memory.*MiB\n    fix: give short"
    ):
        made.fast.generate(prompts_of(4, 5), GREEDY)
    with pytest.raises(NoMemory):
        made.fast.stream(prompts_of(4)[0], GREEDY, lambda new: None)


def test_passes_over_prompts_become_half_as_long(made: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of `generator.batch` there was to write."""
    room_for(2, monkeypatch)
    made.fast.generate(prompts_of(4, 5, 6), GREEDY)
    assert made.fast._engine is not None
    assert made.fast._engine.prompt_tokens == made.fast._config.prompt_tokens // 2


def test_a_conversation_that_does_not_fit_keeps_nothing(made: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    talk, [prompt] = made.fast.conversation(), prompts_of(9)
    said = talk.stream(prompt, GREEDY, lambda new: None)
    own = Engine.logits
    monkeypatch.setattr(Engine, "logits", lambda *_, **__: (_ for _ in ()).throw(SHORT))
    with pytest.raises(NoMemory):
        talk.stream([*prompt, *said], GREEDY, lambda new: None)
    assert made.fast._kept is None
    monkeypatch.setattr(Engine, "logits", own)
    assert talk.stream(prompt, GREEDY, lambda new: None) == said


def test_another_error_is_no_lack_of_memory(made: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    def cache(*_: Any) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(Engine, "cache", cache)
    with pytest.raises(RuntimeError, match="something else"):
        made.fast.generate(prompts_of(4, 5), GREEDY)


def test_padded_batches_become_smaller_too(made: Both, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    prompts = prompts_of(*range(3, 13))
    expected = made.plain.generate(prompts, GREEDY).ids
    own, asked = made.model.generate, []

    def generate(input_ids: torch.Tensor, **options: Any) -> Any:
        asked.append(len(input_ids))
        if len(input_ids) > 3:
            raise SHORT
        return own(input_ids=input_ids, **options)

    monkeypatch.setattr(made.model, "generate", generate)
    assert made.plain.generate(prompts, GREEDY).ids == expected
    assert asked == [10, 5, 2, 2, 2, 2, 2]
    assert "out of memory with 5 completions at a time; going on with 2" in capsys.readouterr().out
    monkeypatch.setattr(made.model, "generate", lambda **_: (_ for _ in ()).throw(SHORT))
    with pytest.raises(NoMemory):
        made.plain.generate(prompts, GREEDY)
    with pytest.raises(NoMemory):
        made.plain.stream(prompts[0], GREEDY, lambda new: None)
