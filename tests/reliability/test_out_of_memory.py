"""A micro-batch that does not fit is computed in parts: the run is the one that it would have been."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ftcore
from ftcore.cli import run as command
from ftcore.guards.memory import NoMemory
from ftcore.guards.parts import sliced, spans
from ftcore.testing.faults import out_of_memory

WORDS = ["+model=llama", "model.tiny=true", "model.dtype=float32", "kernels=[]", "prompts=[]", "trainer.max_steps=3"]
SHORT = ["trainer.max_length=160", "trainer.global_batch=8"]
SGD = ["trainer.optimizer=sgd", "trainer.learning_rate=0.1", "trainer.max_grad_norm=0"]
"""AdamW makes a whole step of the sign of a gradient that is next to nothing, so that rounding alone moves single
weights by more than NEAR: by 1.6e-6 in the test of random passes. SGD shows a loss of the wrong scale."""
NEAR = 1e-6


class Starved:
    """A plugin that runs out of memory."""

    def __init__(self, **fault: Any) -> None:
        self.fault = fault

    @ftcore.hookimpl(wrapper=True)
    def ftcore_train(self, trainer: Any) -> Any:
        self.trainer, self.start = trainer, weights(trainer)
        if not self.fault:
            return (yield)
        with out_of_memory(trainer.model, **self.fault) as self.passes:
            return (yield)


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def trained(
    words: list[str], folder: str, base: Any = WORDS, **fault: Any
) -> tuple[dict[str, torch.Tensor], list[Any], Starved]:
    """The weights, what was logged, and the plugin."""
    plugin = Starved(**fault)
    ftcore.run([*base, *words, f"output_dir={folder}"], plugins=[plugin])
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return weights(plugin.trainer), [entry["loss"] for entry in lines if "loss" in entry], plugin


def same(words: list[str], **fault: Any) -> Starved:
    """A run without and one with the fault: the same losses and weights; the second is returned."""
    whole, losses, _ = trained(words, "whole")
    parts, again, plugin = trained(words, "parts", **fault)
    assert plugin.passes.failed
    assert max((whole[name] - start).abs().max() for name, start in plugin.start.items()) > 100 * NEAR, "it stood still"
    for name, tensor in whole.items():
        assert (parts[name] - tensor).abs().max() <= NEAR, name
    assert again == pytest.approx(losses, abs=1e-5)
    assert plugin.trainer.args.per_device_train_batch_size * plugin.trainer.args.gradient_accumulation_steps == 8
    return plugin


def events(folder: str = "parts") -> list[tuple[int, int]]:
    lines = map(json.loads, Path(folder, "events.jsonl").read_text().splitlines())
    return [(e["rows"], e["rows_at_once"]) for e in lines if e["event"] == "out_of_memory"]


@pytest.mark.parametrize("within_backward", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sft(in_tmp: Path, capsys, within_backward: bool) -> None:
    """The second step's second micro-batch fails, when gradients of the first are there."""
    words = ["+trainer=sft", *SHORT, "trainer.micro_batch=4"]
    plugin = same(words, passes={4}, within_backward=within_backward)
    assert plugin.passes.failed == 1
    assert events() == [(4, 2)]
    said = "step 2: out of memory with 4 rows at a time; going on with 2: the same batch and loss, computed in more"
    assert said in capsys.readouterr().out


def test_the_setting_that_is_named_divides_a_step(in_tmp: Path, capsys) -> None:
    """Three rows fit of ten: a micro-batch of three would be refused."""
    words = ["+trainer=sft", *SHORT, "trainer.global_batch=10", "trainer.micro_batch=5", "trainer.max_steps=1"]
    trained(words, "parts", passes={1})
    assert events() == [(5, 3)]
    assert "going on with 3: the same batch and loss, computed in more parts (trainer.micro_batch=2 spares" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_at_random_passes(in_tmp: Path, seed: int) -> None:
    """Two passes anywhere in the run fail, forward or within the backward, also those that make up for the first."""
    drawn = random.Random(seed)
    passes, within = set(drawn.sample(range(1, 7), 2)), drawn.random() < 0.5
    plugin = same(["+trainer=sft", *SHORT, *SGD, "trainer.micro_batch=4"], passes=passes, within_backward=within)
    assert plugin.passes.failed == 2
    assert events() == [(4, 2), (2, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "measured"),
    [("sft", ("num_tokens", "entropy")), ("dpo", ("num_tokens", "rewards/margins")), ("orpo", ("nll_loss",))],
)
def test_what_is_logged_counts_no_pass_twice(in_tmp: Path, name: str, measured: tuple[str, ...]) -> None:
    """In a line of the log are two steps, and it is the second pass of the first that fails."""
    words = [f"+trainer={name}", *SHORT, *SGD, "trainer.micro_batch=4", "trainer.logging_steps=2"]
    found = []
    for folder, fault in (("whole", {}), ("parts", {"passes": {2}})):
        trained(words, folder, **fault)
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        found.append([[e[key] for key in measured] for e in lines if "loss" in e])
    assert len(found[0]) >= 1
    for one, other in zip(*found, strict=True):
        assert other == pytest.approx(one, rel=1e-4)


MATRIX = {
    # Words, and how many rows of a pass still fit: a preference trainer reads both answers of a row in one. Packed rows
    # are one row, so that a pass fails instead.
    "cpt": (["+trainer=cpt"], None),
    "packed": (["+trainer=sft", "trainer.packing=true", "data=text"], None),
    "dpo": (["+trainer=dpo"], 8),
    "kto": (["+trainer=kto"], 4),
    "orpo": (["+trainer=orpo"], 8),
    "simpo": (["+trainer=simpo"], 8),
    "reward": (["+trainer=reward"], 8),
    "classify": (["+trainer=classify"], 4),
    "gkd": (["+trainer=gkd", "trainer.lmbda=0"], 4),
    "grpo": (["+trainer=grpo", "+reward=[length]"], 4),
    "bnpo": (["+trainer=grpo", "+reward=[length]", "trainer.loss_type=bnpo"], 4),
    "means": (["+trainer=grpo", "+reward=[length]", "trainer.loss_type=grpo"], 4),
    "rloo": (["+trainer=rloo", "+reward=[length]"], 4),
    "ppo": (["+trainer=ppo", "+reward=[length]"], 4),
}


@pytest.mark.parametrize("name", [n if n in ("dpo",) else pytest.param(n, marks=pytest.mark.slow) for n in MATRIX])
@pytest.mark.parametrize("within_backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_trainer_that_can_cut_its_batch(in_tmp: Path, name: str, within_backward: bool) -> None:
    """As on a GPU that holds fewer rows: three steps, one of which finds it out."""
    words, rows = MATRIX[name]
    short = [*SHORT, *SGD]
    short += ["trainer.max_completion_length=8"] if "+reward=[length]" in words else []
    fault = {"passes": {2}} if rows is None else {"rows": rows}
    plugin = same([*words, *short], within_backward=within_backward, **fault)
    assert plugin.passes.failed == 1, "what fits was forgotten"
    assert events() == [(8, 4)]


@pytest.mark.slow
def test_three_times_too_large(in_tmp: Path) -> None:
    # Sums have another order for every number of rows, and AdamW makes whole steps of gradients near zero: it moved one
    # weight by 1.6e-6 on an H200, and by 2.2e-6 on a CPU.
    same(["+trainer=sft", *SHORT, *SGD], rows=1)
    assert events() == [(8, 4), (4, 2), (2, 1)]


@pytest.mark.parametrize(
    ("words", "fault", "said"),
    [
        (["trainer.global_batch=2"], {"rows": 0}, "out of memory with one row at a time: CUDA out of memory."),
        (["trainer.micro_batch=16", "trainer.global_batch=16"], {"rows": 1}, "with 2 rows at a time, the 4th time: "),
        (["data.streaming=true"], {"rows": 4}, "    the micro-batch cannot be cut, for its rows come from a stream\n"),
    ],
)
def test_one_clear_message_where_it_is_no_use(in_tmp: Path, capsys, monkeypatch, words, fault, said) -> None:
    from ftcore.defaults import train

    whole = train.ftcore_train

    def starved(plan: Any, trainer: Any) -> Any:
        with out_of_memory(trainer.model, **fault):
            return whole(plan, trainer)

    monkeypatch.setattr(train, "ftcore_train", ftcore.hookimpl(trylast=True)(starved))
    assert command(["+trainer=sft", *WORDS, *SHORT, *words, "output_dir=run"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.endswith("fix: set memory=least, or lower trainer.micro_batch or trainer.max_length\n")
    assert "Traceback" not in err


def test_negatives_of_the_batch_are_not_cut(in_tmp: Path) -> None:
    with pytest.raises(NoMemory, match="cannot be cut, for a row's negatives are the other rows"):
        trained(["+trainer=embed", *SHORT], "run", ["+model=bert", *WORDS[1:]], rows=4)


def test_a_run_that_goes_on_knows_what_fits(in_tmp: Path) -> None:
    words = ["+trainer=sft", *SHORT, "trainer.save_steps=1"]
    trained([*words, "trainer.max_steps=1"], "run", rows=4)
    more = ["resume.checkpoint=last", "resume.allow=[trainer.max_steps]"]
    _, _, plugin = trained([*words, *more], "run", rows=4)
    assert plugin.trainer.state.global_step == 3
    assert plugin.passes.failed == 0


def test_an_evaluation_is_done_again_with_fewer_rows(in_tmp: Path) -> None:
    words = ["+trainer=sft", *SHORT, "trainer.eval_steps=1"]
    trained(words, "whole")
    _, _, plugin = trained(words, "parts", without_gradients=True, rows=4)
    assert plugin.passes.failed == 1
    found = []
    for folder in ("whole", "parts"):
        lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
        found.append([[e["eval_loss"], e["eval_mean_token_accuracy"]] for e in lines if "eval_loss" in e])
    assert len(found[0]) == len(found[1]) >= 4
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, abs=0.05)


def test_cuts() -> None:
    assert spans(8, 4) == [(0, 4), (4, 8)]
    assert spans(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert spans(3, 8) == [(0, 3)]
    batch = {"ids": torch.arange(6).view(3, 2), "names": ["a", "b", "c"], "tokens": torch.tensor(7), "none": None}
    part = sliced(batch, 1, 3)
    assert part["ids"].tolist() == [[2, 3], [4, 5]]
    assert (part["names"], part["tokens"].item(), part["none"]) == (["b", "c"], 7, None)
    assert SimpleNamespace(**sliced({"rows": [1, 2]}, 0, 1)).rows == [1]
