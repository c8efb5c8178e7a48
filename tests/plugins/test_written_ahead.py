"""Held-out prompts: how many a generator is given in a call, and that nothing else of an evaluation changes by it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from preference_runs import held

from ftcore import Completions, Sampling, cli
from ftcore.specs import Batching
from ftcore_trainers._written_ahead import TIMES, Ahead

ROWS = [{"prompt": "word " * (1 + 5 * n % 17) + f"{n}?"} for n in range(19)]
MICRO = 4
WORDS = ("+reward=[length]", "data=prompts", f"trainer.micro_batch={MICRO}", f"trainer.global_batch={MICRO}")
WORDS = (*WORDS, "trainer.max_completion_length=8", "trainer.max_length=400")
GROUPS = ("trainer.num_generations=2",)
TRAINERS = {"grpo": (*WORDS, *GROUPS), "rloo": (*WORDS, *GROUPS), "ppo": WORDS}


class Numbered:
    """Completions that depend on the prompt and on how many were written before: out of order they are others."""

    def __init__(self) -> None:
        self.calls: list[list[list[int]]] = []
        self.rolling = 0

    def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
        assert self.rolling == 1
        first = sum(map(len, self.calls))
        self.calls.append([list(ids) for ids in prompt_ids])
        ids = [
            [(31 * sum(prompt) + 7 * n + k) % 250 + 3 for k in range(1 + n % sampling.max_new_tokens)]
            for n, prompt in enumerate(prompt_ids, first)
        ]
        return Completions(ids=ids, logprobs=[[-0.1 * token for token in row] for row in ids])

    def begin_rollout(self) -> None:
        self.rolling += 1

    def end_rollout(self) -> None:
        self.rolling -= 1

    def weights_changed(self) -> None: ...


class NumberedThree(Numbered):
    """The same, by a generator that says how many it completes at once."""

    at_once = 3


def write_rows(folder: Path) -> Path:
    path = folder / "held.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def evaluated(trainer: Any, generator: Numbered) -> dict[str, float]:
    """What an evaluation measures, but for its own speed."""
    trainer._generator = generator
    found = trainer.evaluate()
    assert generator.rolling == 0
    return {name: value for name, value in found.items() if "_per_second" not in name and "time" not in name}


@pytest.fixture(scope="module", params=TRAINERS)
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    words = (*TRAINERS[request.param], f"data.eval_path='{write_rows(folder)}'", "prompts=[]")
    return held(folder / "run", request.param, *words).trainer


def test_a_generator_that_batches_is_given_the_prompts_of_many(trainer: Any) -> None:
    """The numbers are those of a generator that is asked batch by batch; the last call has what is left."""
    alone, ahead = Numbered(), NumberedThree()
    assert not isinstance(alone, Batching)
    assert isinstance(ahead, Batching)
    expected = evaluated(trainer, alone)
    assert evaluated(trainer, ahead) == expected
    rows = len(ROWS) * getattr(trainer, "num_generations", 1)
    size = TIMES * ahead.at_once
    assert size > MICRO
    assert {len(call) for call in alone.calls[:-1]} == {MICRO}
    assert [len(call) for call in ahead.calls] == [size] * (rows // size) + [rows % size]
    assert [*chain(*ahead.calls)] == [*chain(*alone.calls)]
    assert len({len(ids) for ids in ahead.calls[0]}) > 1
    assert expected["eval_reward"] < 0


def test_an_evaluation_that_was_broken_off_leaves_nothing(trainer: Any) -> None:
    expected = evaluated(trainer, NumberedThree())
    loader = trainer.get_eval_dataloader()
    plain = loader.base_dataloader

    class Fails(NumberedThree):
        def generate(self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling) -> Completions:
            if self.calls:
                raise KeyError("the second call")
            return super().generate(prompt_ids, sampling)

    trainer._generator = Fails()
    with pytest.raises(KeyError, match="the second call"):
        trainer.evaluation_loop(loader, "Evaluation")
    assert loader.base_dataloader is plain
    assert trainer._ahead is None
    trainer.forget_evaluation()
    assert evaluated(trainer, NumberedThree()) == expected


def test_other_prompts_are_not_answered_from_what_was_written() -> None:
    """A talk that goes on, and a batch that nobody asks for, are the trainer's business."""
    asked: list[Any] = []

    def write(prompts: Sequence[Sequence[int]]) -> Completions:
        asked.append(prompts)
        return Completions(ids=[[sum(ids)] for ids in prompts])

    rows = [[{"ids": [n]}] for n in range(5)]
    ahead = Ahead(rows, 2, lambda batch: [row["ids"] for row in batch])
    assert len(ahead) == 5
    for number, batch in enumerate(ahead):
        assert batch == rows[number]
        assert ahead.taken([[9, 9]], write) is None
        assert ahead.taken([(number,)], write) == Completions(ids=[[number]])
    assert asked == [[[0], [1]], [[2], [3]], [[4]]]
    assert ahead.taken([[4]], write) is None


PLUGIN = """
import ftcore
from pathlib import Path


class Counted:
    at_once = 3

    def __init__(self, inner):
        self.inner = inner

    def generate(self, prompt_ids, sampling):
        with Path("calls").open("a") as out:
            print(len(prompt_ids), file=out)
        return self.inner.generate(prompt_ids, sampling)

    def begin_rollout(self):
        self.inner.begin_rollout()

    def end_rollout(self):
        self.inner.end_rollout()

    def weights_changed(self):
        self.inner.weights_changed()


@ftcore.hookimpl(wrapper=True)
def ftcore_make_generator():
    return Counted((yield))
"""


@pytest.mark.parametrize("more", [(), ("data.streaming=true", "trainer.max_steps=1")], ids=["rows", "stream"])
def test_eval_s_numbers_are_those_of_batch_by_batch(in_tmp: Path, more: tuple[str, ...]) -> None:
    """With `generator=fast`, whose prompts have a seed each."""
    write_rows(in_tmp)
    found = {}
    for name, text in (("many", PLUGIN), ("few", PLUGIN.replace("    at_once = 3\n", ""))):
        Path(f"{name}.py").write_text(text)
        words = ["+model=qwen3", "model.tiny=true", "model.dtype=float32", "+trainer=grpo", *TRAINERS["grpo"]]
        words += [*more, "data.eval_path=held.jsonl", f"plugins=[{name}.py]", f"output_dir={name}"]
        assert cli.run(["eval", *words]) == 0
        found[name] = json.loads(Path(name, "eval.json").read_text())
        found[name]["calls"] = [int(line) for line in Path("calls").read_text().split()]
        Path("calls").unlink()
    assert found["many"].pop("calls") == [12, 12, 12, 2]
    assert found["few"].pop("calls") == [MICRO] * 9 + [2]
    assert found["many"]["value"] == pytest.approx(found["few"]["value"])
