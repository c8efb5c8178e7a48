"""`ftcore chat`: answers are read while they are written, by the run's generator, and Ctrl-C ends one of them."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ftcore.api import run
from ftcore.config import SamplingConfig
from ftcore.errors import Problem, Refused
from ftcore.tasks import chat
from ftcore.testing import runs

SETTINGS = SamplingConfig()
COUNTED = """
import ftcore

class Counted:
    def __init__(self, inner):
        self.inner = inner

    def generate(self, prompt_ids, sampling):
        print(f"[generate {len(prompt_ids)}]")
        return self.inner.generate(prompt_ids, sampling)

    def begin_rollout(self):
        print("[begin]")
        self.inner.begin_rollout()

    def end_rollout(self):
        print("[end]")
        self.inner.end_rollout()

    def weights_changed(self):
        print("[changed]")
        self.inner.weights_changed()

@ftcore.hookimpl(wrapper=True)
def ftcore_make_generator():
    return Counted((yield))
"""

Talk = Sequence[dict[str, str]]


def talk(monkeypatch: pytest.MonkeyPatch, answering: chat.Answering, typed: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert chat._talk(answering, SETTINGS) == 0


def test_an_answer_is_printed_while_it_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def answering(messages: Talk, show: chat.Show) -> None:
        for piece in ("Once", " upon", "", " a\ntime"):
            show(piece)
            seen.append(capsys.readouterr().out)

    talk(monkeypatch, answering, "Tell\n")
    assert seen == ["Once", " upon", "", " a\ntime"], "as it is, and at once"
    assert capsys.readouterr().out == "\n"


def test_ctrl_c_ends_the_answer_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was read stays in the conversation."""
    heard: list[Talk] = []
    before = signal.getsignal(signal.SIGINT)

    def answering(messages: Talk, show: chat.Show) -> None:
        heard.append(list(messages))
        show("One two")
        if len(heard) == 1:
            signal.raise_signal(signal.SIGINT)
        show(" three")

    talk(monkeypatch, answering, "Count\nGo on\n")
    assert capsys.readouterr().out == "One two\nOne two three\n"
    assert [message["content"] for message in heard[1]] == ["Count", "One two", "Go on"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_answer_that_ends_before_its_first_word_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Talk] = []

    def answering(messages: Talk, show: chat.Show) -> None:
        heard.append(list(messages))
        if len(heard) == 1:
            signal.raise_signal(signal.SIGINT)
        show("Yes")

    talk(monkeypatch, answering, "One?\nTwo?\n")
    assert [message["content"] for message in heard[1]] == ["Two?"]


def test_a_conversation_that_a_generator_refuses_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For its length; a first question, or another reason, ends it."""

    def answering(messages: Talk, show: chat.Show) -> None:
        if len(messages) > 1:
            raise Refused(Problem("generator.max_length", "too short", "use more"))
        show("Yes")

    talk(monkeypatch, answering, "One?\nTwo?\n\nThree?\n")
    out = capsys.readouterr().out
    assert out.count("Yes") == 2
    assert out.count("No room: generator.max_length") == 1

    def refusing(messages: Talk, show: chat.Show) -> None:
        raise Refused(Problem("generator.max_length", "too short", "use more"))

    with pytest.raises(Refused):
        talk(monkeypatch, refusing, "One?\n")


def test_ctrl_c_twice_or_at_the_prompt_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)

    def deaf(messages: Talk, show: chat.Show) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        talk(monkeypatch, deaf, "Hi\nHi\n")
    assert signal.getsignal(signal.SIGINT) is before

    class Keyboard(io.StringIO):
        def readline(self, *_: object) -> str:
            signal.raise_signal(signal.SIGINT)
            return "Hi\n"

    monkeypatch.setattr(sys, "stdin", Keyboard())
    with pytest.raises(KeyboardInterrupt):
        chat._talk(deaf, SETTINGS)


def counted(folder: Path) -> str:
    (folder / "counted.py").write_text(COUNTED, encoding="utf-8")
    return "plugins=[counted.py]"


def test_the_run_s_generator_writes(
    in_tmp: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*runs.TINY, counted(in_tmp), "sampling.max_new_tokens=3"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAgain\n"))
    assert chat.main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert lines == ["[begin]", "[generate 1]", "[generate 1]", "[end]"]


def test_both_generators_say_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the whole command."""
    load, said = chat.pipeline.load, []

    def loaded(hooks: Any, plan: Any) -> Any:
        found = load(hooks, plan)
        runs.shake(found.model)  # as it is drawn, it writes blanks
        return found

    monkeypatch.setattr(chat.pipeline, "load", loaded)
    for which in ("fast", "transformers"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nName a river.\n\nHi\n"))
        assert chat.main([*runs.TINY, f"generator={which}", "sampling.max_new_tokens=24"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert len(said[0].split()) > 2


def test_answers_of_a_run_are_by_its_generator(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All prompts at once, before and after; the generator is told that the weights are others."""
    words = [*runs.TINY, *runs.SHORT, "+trainer=sft", "trainer.max_steps=1", counted(in_tmp), "prompts=[Hi,Ho]"]
    run([*words, "output_dir=mine"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    answers = ["[begin]", "[generate 2]", "[end]"]
    # Told before training as well, which may go on from a checkpoint.
    assert lines == [*answers, "[changed]", "[changed]", *answers]
    state = json.loads((in_tmp / "mine" / "run.json").read_text(encoding="utf-8"))
    assert [answer["prompt"] for answer in state["answers"]] == ["Hi", "Ho"]


def test_a_run_without_a_generator_says_what_to_do(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_of = chat.config_of
    monkeypatch.setattr(chat, "config_of", lambda argv: replace(config_of(argv), generator=None))
    with pytest.raises(Refused, match="use generator=fast"):
        chat.main(list(runs.TINY))


def test_who_hears_is_not_said_to_write_nothing() -> None:
    with pytest.raises(Refused, match="hears recordings"):
        chat.main(["+model=whisper", "model.tiny=true"])
