"""Real weights on real rows, through the command line: what was held out is better after training than before.

`docs/how-to/real-weights.md` gives the figures. Every test is skipped unless the packages with its weights and its rows
are installed, and says which.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_models import gemma, minilm, whisper
from real_rows import Talk, folio, mixed, recordings, talks, written

from ftcore import checkpoint
from ftcore.catalog import installed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHAT = ("psychology", "emotion", "ai", "botprofile", "conversations")
FEW = 20
"""Topics with fewer questions are left out."""


@pytest.fixture
def trained(ftcore_cli: Any, in_tmp: Path) -> Any:
    """A run through the command line; returns its metrics, its answers, and what it printed."""

    def call(*words: str) -> tuple[dict[str, float], list[dict[str, str]], str]:
        done = ftcore_cli(*words, "data.path=train.jsonl", "data.eval_path=held_out.jsonl", "output_dir=out")
        assert done.returncode == 0, done.stderr
        record = json.loads((in_tmp / "out" / "run.json").read_text(encoding="utf-8"))
        return record["metrics"], record["answers"], done.stdout

    return call


def test_smollm2_learns_how_a_chatbot_answers(trained: Any, in_tmp: Path) -> None:
    family = installed().find("model", "smollm2").load().ftcore_model_family()
    if checkpoint.bundled_file(family.bundle) is None:
        pytest.skip(family.bundle.install)
    rows = [{"asked": talk.question, "said": talk.answer} for talk in mixed(talks(CHAT))]
    written(in_tmp / "held_out.jsonl", rows[:30])
    written(in_tmp / "train.jsonl", rows[30:])
    columns = ("data.columns.instruction=asked", "data.columns.output=said")
    metrics, answers, _ = trained(
        *("+model=smollm2", "+trainer=sft", "data=alpaca", *columns, "trainer.max_length=128"),
        *("trainer.max_steps=20", "trainer.learning_rate=3e-4"),
        *('prompts=["Do you ever get angry?"]', "sampling.max_new_tokens=32"),
    )
    assert metrics["eval_loss"] < 0.87 * metrics["eval_loss_before"]
    assert len(answers[0]["after"].split()) < len(answers[0]["before"].split()), "the chatbot's answers are short"


def test_gemma_goes_on_in_the_spelling_of_1623(trained: Any, in_tmp: Path) -> None:
    written(in_tmp / "train.jsonl", [{"text": text} for text in folio("macbeth", 60)])
    written(in_tmp / "held_out.jsonl", [{"text": text} for text in folio("hamlet", 60)[:6]])
    place = gemma(in_tmp / "gemma")
    metrics, answers, _ = trained(
        *("+model=gemma3", f"model.path={place}", "+trainer=cpt", "trainer.max_length=96"),
        *("trainer.global_batch=2", "trainer.max_steps=8", "trainer.learning_rate=1e-3"),
        *('prompts=["Enter Hamlet.\n\n  Ham. I "]', "sampling.max_new_tokens=24"),
    )
    assert metrics["eval_loss"] < 0.93 * metrics["eval_loss_before"]
    assert answers[0]["after"] != answers[0]["before"]


def test_minilm_learns_what_questions_are_about(trained: Any, in_tmp: Path) -> None:
    held_out, train = topics()
    written(in_tmp / "held_out.jsonl", ({"text": talk.question, "label": talk.topic} for talk in held_out))
    written(in_tmp / "train.jsonl", ({"text": talk.question, "label": talk.topic} for talk in train))
    metrics, _, _ = trained("+model=bert", f"model.path={minilm()}", "+trainer=classify", "trainer.epochs=2")
    assert metrics["eval_accuracy_before"] < 0.5
    assert metrics["eval_accuracy"] > 0.75
    assert metrics["eval_loss"] < 0.5 * metrics["eval_loss_before"]


def test_minilm_puts_questions_of_a_topic_closer_together(trained: Any, in_tmp: Path) -> None:
    held_out, train = topics()
    written(in_tmp / "held_out.jsonl", alike(held_out, 200, seed=1))
    written(in_tmp / "train.jsonl", alike(train, 480, seed=2))
    metrics, _, _ = trained("+model=bert", f"model.path={minilm()}", "+trainer=embed", "trainer.epochs=2")
    assert metrics["eval_spearman"] > metrics["eval_spearman_before"] + 0.03
    assert metrics["eval_loss"] < 0.8 * metrics["eval_loss_before"]


def test_whisper_hears_what_it_misheard(trained: Any, in_tmp: Path) -> None:
    rows = recordings()
    held_out = [row for row in rows if row["audio"].endswith(("0880.wav", "0930.wav"))]
    written(in_tmp / "held_out.jsonl", held_out)
    written(in_tmp / "train.jsonl", (row for row in rows if row not in held_out))
    place = whisper(in_tmp / "whisper")
    metrics, _, _ = trained(
        *("+model=whisper", f"model.path={place}", "+trainer=speech", "trainer.max_length=64"),
        *("trainer.global_batch=3", "trainer.max_steps=10"),
    )
    assert metrics["eval_wer_before"] == pytest.approx(2 / 16), "`old-sposed` for `ill disposed`"
    assert metrics["eval_wer"] == 0


def topics() -> tuple[list[Talk], list[Talk]]:
    """120 questions that are held out, and those that are trained on, of the topics with enough of them."""
    found = talks()
    count = Counter(talk.topic for talk in found)
    rows = mixed(talk for talk in found if count[talk.topic] >= FEW)
    return rows[:120], rows[120:]


def alike(rows: list[Talk], count: int, seed: int) -> Iterator[dict[str, object]]:
    """Pairs of questions, every other one of the same topic (1.0), the rest of two topics (0.0)."""
    drawn, of = random.Random(seed), defaultdict(list)
    for row in rows:
        of[row.topic].append(row.question)
    several = [topic for topic, questions in of.items() if len(questions) > 1]
    for number in range(count):
        if number % 2:
            one, other = drawn.sample(of[drawn.choice(several)], 2)
        else:
            one, other = (drawn.choice(of[topic]) for topic in drawn.sample(list(of), 2))
        yield {"sentence1": one, "sentence2": other, "score": float(number % 2)}
