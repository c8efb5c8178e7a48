"""A step that is not finite changes nothing, is named, and stops the run if it is not the only one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import ftcore
from ftcore.cli import run as command
from ftcore.errors import Exit
from ftcore.guards import non_finite
from ftcore.guards.finite import NonFinite
from ftcore.guards.non_finite import SkipsNonFinite
from ftcore.guards.skipping import innermost
from ftcore.guards.tally import Tally
from ftcore.testing.faults import poison

ROWS = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(12)
]
WORDS = ["+model=llama", "model.tiny=true", "model.dtype=float32", "kernels=[]", "output_dir=run", "prompts=[]"]
SFT = [*WORDS, "+trainer=sft", "data.path=rows.jsonl", "trainer.global_batch=2", "trainer.max_steps=4"]


class Before(TrainerCallback):
    """Weights and optimizer at the end of every step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(everything(self.trainer))


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    found = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for number, (_, state) in enumerate(innermost(trainer.optimizer).state.items()):
        found |= {f"{number} {key}": torch.as_tensor(value).clone() for key, value in state.items()}
    return found


class Poisoned:
    """A plugin that poisons some steps."""

    def __init__(self, place: str, *steps: int, **options: Any) -> None:
        self.place, self.steps, self.options = place, steps, options

    @ftcore.hookimpl(wrapper=True)
    def ftcore_train(self, trainer: Any) -> Any:
        self.trainer, self.before = trainer, Before(trainer)
        trainer.add_callback(self.before)
        if not self.steps:
            return (yield)
        with poison(trainer, self.place, set(self.steps), **self.options):
            return (yield)


@pytest.fixture
def rows(in_tmp: Path) -> None:
    (in_tmp / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def test_gradients_outlive_a_second_look_that_writes_where_they_were() -> None:
    """As the launches of recorded layers do, which leave every step's gradients in the same memory."""
    guard: Any = SkipsNonFinite.__new__(SkipsNonFinite)
    weight, alone = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    guard.optimizer, guard.state = torch.optim.SGD([weight, alone]), SimpleNamespace(global_step=7)
    home = weight.grad = torch.arange(3.0)
    with guard._as_if_nothing_happened(SimpleNamespace(number=6)):
        assert weight.grad is None
        assert guard.state.global_step == 5
        weight.grad = home.fill_(math.nan)
    assert torch.equal(weight.grad, torch.arange(3.0))
    assert alone.grad is None
    assert guard.state.global_step == 7


def events() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]


def losses() -> dict[int, float | None]:
    lines = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in lines if "loss" in entry}


def all_finite(folder: str = "run") -> bool:
    files = list(Path(folder).rglob("*.safetensors"))
    assert files
    tensors = [tensor for file in files for tensor in load_file(file).values() if tensor.is_floating_point()]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("input", ["trainer.micro_batch=1"]),
        ("gradient", ["trainer.max_grad_norm=0", "trainer.weight_decay=0.1"]),
        pytest.param("loss", ["trainer.micro_batch=1"], marks=pytest.mark.slow),
        pytest.param("gradient", ["trainer.optimizer=sgd", "trainer.weight_decay=0.1"], marks=pytest.mark.slow),
        pytest.param("loss", ["trainer.optimizer=adamw_torch_fused"], marks=pytest.mark.slow),
    ],
)
def test_one_step_is_skipped_and_named(rows, capsys, place: str, words: list[str]) -> None:
    plugin = Poisoned(place, 2)
    ftcore.run([*SFT, "trainer.save_steps=1", *words], plugins=[plugin])
    seen = plugin.before.seen
    assert seen[1].keys() == seen[2].keys()
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1]), "the step changed something"
    assert any(not torch.equal(seen[2][name], seen[3][name]) for name in seen[2]), "the next step changed nothing"
    (event,) = events()
    assert (event["event"], event["step"]) == ("non_finite", 2)
    assert event["again"].startswith("reproducible")
    order = [row for part in event["rows"] for row in part]
    assert len(set(order)) == 2
    assert set(order) <= set(range(12))
    assert f"step 2: {' and '.join(event['not_finite'])} not finite (rows {order[0]}, {order[1]} of" in (
        capsys.readouterr().out
    )
    logged = losses()
    assert (logged[2] is None) == (place != "gradient")
    assert all(isinstance(logged[step], float) and logged[step] > 0 for step in (1, 3, 4))
    assert all_finite()
    state = json.loads(Path("run/run.json").read_text())
    assert state["status"] == "done"
    assert state["metrics"]["train_loss"] > 1


def test_a_transient_fault_is_told_from_one_that_happens_again(rows) -> None:
    ftcore.run(SFT, plugins=[Poisoned("loss", 3, once=True)])
    assert events()[0]["again"].startswith("transient")


@pytest.mark.slow
def test_looking_again_leaves_no_trace(rows) -> None:
    """With dropout, so that the generators count."""
    final = []
    for number, repeatable in enumerate((True, False)):
        plugin = Poisoned("loss", 2)

        @ftcore.hookimpl(wrapper=True)
        def ftcore_make_trainer(repeatable: bool = repeatable) -> Any:
            trainer = yield
            trainer.repeatable = repeatable
            return trainer

        words = ["adapter.dropout=0.3", f"output_dir=run{number}"]
        ftcore.run([*SFT, *words], plugins=[plugin, ftcore_make_trainer])
        final.append(everything(plugin.trainer))
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_the_rows_are_those_of_the_step(rows) -> None:
    """By the tokens that the model saw, also in a run that went on."""
    seen: dict[int, list[str]] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            trainer = plugin.trainer
            decode = trainer.processing_class.decode
            texts = [decode(ids) for batch in trainer._step_batches for ids in batch["input_ids"]]
            wanted = [decode(trainer.train_dataset[row]["input_ids"]) for part in trainer._step_rows for row in part]
            assert all(text.startswith(want) for text, want in zip(texts, wanted, strict=True))
            seen[state.global_step] = wanted

    @ftcore.hookimpl
    def ftcore_callbacks() -> Any:
        return [Look()]

    words = [*SFT, "trainer.micro_batch=1", "trainer.save_steps=1", "trainer.max_steps=9"]
    for resume in ([], ["resume.checkpoint=run/checkpoints/checkpoint-8", "resume.allow=[trainer.max_steps]"]):
        plugin = Poisoned("loss")
        ftcore.run([*words, *resume], plugins=[plugin, ftcore_callbacks])
        if not resume:
            first, seen = seen, {}
            shutil.rmtree("run/checkpoints/checkpoint-9")
    assert seen == {9: first[9]}


@pytest.mark.parametrize(
    ("place", "steps", "said"),
    [
        ("loss", (1, 2, 3), "training stopped at step 3: 3 steps in a row were not finite\n"),
        ("weight", (2,), "is not finite, so the checkpoint of step 2 is not kept\n"),
        ("optimizer", (2,), "is not finite, so the checkpoint of step 2 is not kept\n"),
    ],
)
def test_a_run_that_cannot_go_on_ends_with_70(rows, monkeypatch, capsys, place: str, steps: Any, said: str) -> None:
    from ftcore.defaults import train

    whole = train.ftcore_train

    def poisoned(plan: Any, trainer: Any) -> Any:
        with poison(trainer, place, set(steps)):
            return whole(plan, trainer)

    monkeypatch.setattr(train, "ftcore_train", ftcore.hookimpl(trylast=True)(poisoned))
    assert command([*SFT, "trainer.save_steps=1"]) == Exit.NUMERIC == 70
    err = capsys.readouterr().err
    assert said in err
    assert "    fix: " in err
    assert "Traceback" not in err
    assert all_finite("run/checkpoints")
    assert not Path("run/trained").exists()
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"


def test_what_waits_for_the_log_is_kept_without_it(rows) -> None:
    """A checkpoint between two lines of the log, and the run that goes on from it."""
    words = [*SFT, "trainer.save_steps=1", "trainer.logging_steps=4"]
    ftcore.run(words, plugins=[Poisoned("input", 2)])
    assert losses() == {4: None}
    assert all_finite()
    for file in Path("run/checkpoints").rglob("progress.json"):
        assert "NaN" not in file.read_text()
    last, newer = sorted(Path("run/checkpoints").iterdir())[-2:]
    shutil.rmtree(newer)
    ftcore.run([*words, f"resume.checkpoint={last}"], plugins=[Poisoned("loss")])
    assert losses()[4] > 1


@pytest.mark.parametrize("place", ["weight", "optimizer"])
def test_poison_of_the_last_step_is_not_kept(rows, place: str) -> None:
    with pytest.raises(NonFinite, match="is not finite, so the checkpoint of step 4 is not kept"):
        ftcore.run([*SFT, "trainer.save_steps=100"], plugins=[Poisoned(place, 4)])
    assert not Path("run/trained").exists()
    assert not list(Path("run").rglob("*.safetensors"))


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "own"])
@pytest.mark.parametrize("steps", [(2,), pytest.param((4,), marks=pytest.mark.slow)])
def test_skipped_on_the_device_is_skipped_by_the_host(rows, monkeypatch, optimizer: str, steps: Any) -> None:
    """The flag that the optimizer reads, on the CPU, which has it too; read by the host one step late."""
    from ftcore_kernels.optim.adamw_8bit import AdamW8bit

    @ftcore.hookimpl
    def ftcore_make_optimizer(model: Any) -> Any:
        return AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-3, min_8bit_size=1)

    final, told = [], []
    for number, on_device in enumerate((False, True)):
        monkeypatch.setattr(non_finite, "reads_flag", lambda *_, on_device=on_device: on_device)
        plugin = Poisoned("gradient", *steps)
        words = [f"output_dir=run{number}", "trainer.logging_steps=3"]
        words += ["trainer.optimizer=adamw_torch_fused"] if optimizer != "own" else []
        ftcore.run([*SFT, *words], plugins=[plugin, *([ftcore_make_optimizer] if optimizer == "own" else [])])
        final.append(everything(plugin.trainer))
        told.append(json.loads(Path(f"run{number}/events.jsonl").read_text()))
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    assert [(t["step"], t["rows"]) for t in told] == [(steps[0], told[0]["rows"])] * 2


@pytest.mark.parametrize(
    ("words", "attribute", "skipped"),
    [
        # TRL makes an advantage of 0 of it, so that only the group is lost.
        (["+trainer=grpo", "trainer.num_generations=2", "trainer.global_batch=4"], "reward_funcs", []),
        (["+trainer=ppo", "trainer.num_ppo_epochs=1", "trainer.num_mini_batches=1"], "_rewards", [2]),
    ],
)
def test_a_reward_that_is_not_finite(in_tmp: Path, words: list[str], attribute: str, skipped: list[int]) -> None:
    """Past the guard of rewards, which would take it for a default: what comes of it in the loss is skipped."""
    calls = 0

    def bad(completions: Any, **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        return [math.inf if calls == 2 and n == 0 else float(n) for n in range(len(completions))]

    class Plugin(Poisoned):
        @ftcore.hookimpl(wrapper=True)
        def ftcore_make_trainer(self) -> Any:
            trainer = yield
            setattr(trainer, attribute, [bad])
            return trainer

    plugin = Plugin("loss")
    words = [*words, "trainer.max_steps=3", "trainer.max_completion_length=4", "+reward=[length]"]
    ftcore.run([*WORDS, *words], plugins=[plugin])
    assert ([event["step"] for event in events()] if Path("run/events.jsonl").exists() else []) == skipped
    seen = plugin.before.seen
    for step in skipped:
        assert all(torch.equal(seen[step - 1][name], seen[step][name]) for name in seen[step])
    assert any(not torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert all_finite()
    logged = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    if not skipped:
        assert [entry["reward"] is None for entry in logged if "reward" in entry] == [False, True, False]


def test_what_is_too_much() -> None:
    tally = Tally()
    assert [tally.add(bad) for bad in (True, True, False, True, True)] == [""] * 5
    assert tally.add(True) == "3 steps in a row were not finite"
    tally = Tally()
    assert not any(tally.add(number in (50, 98)) for number in range(99))
    assert tally.add(True) == "3 of the last 100 steps were not finite"
    tally = Tally()
    assert not any(tally.add(number in (50, 150, 250)) for number in range(300))
    assert tally.skipped == 3


RL = ["trainer.max_completion_length=8", "+reward=[length]", "trainer.global_batch=4"]
TRAINERS = {
    "sft": ("llama", []),
    "cpt": ("llama", []),
    "dpo": ("llama", ["trainer.global_batch=4"]),
    "kto": ("llama", ["trainer.global_batch=4"]),
    "orpo": ("llama", ["trainer.global_batch=4"]),
    "simpo": ("llama", ["trainer.global_batch=4"]),
    "reward": ("llama", ["trainer.global_batch=4"]),
    "gkd": ("llama", ["trainer.max_completion_length=8", "trainer.global_batch=4"]),
    "grpo": ("llama", [*RL, "trainer.num_generations=2"]),
    "rloo": ("llama", [*RL, "trainer.num_generations=2"]),
    "online_dpo": ("llama", RL),
    "ppo": ("llama", RL),
    "classify": ("modernbert", []),
    "embed": ("bert", ["trainer.global_batch=4"]),
    "speech": ("whisper", []),
    "tts": ("csm", []),
}


def test_every_trainer_is_here() -> None:
    from ftcore.catalog import installed

    assert {name for name in installed().names("trainer") if "/" not in name} >= set(TRAINERS)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_skips_a_step_that_is_not_finite(in_tmp: Path, name: str) -> None:
    model, words = TRAINERS[name]
    plugin = Poisoned("gradient", 2)
    base = [f"+model={model}", *WORDS[1:], f"+trainer={name}", "trainer.max_steps=3", "trainer.max_length=160"]
    ftcore.run([*base, *words], plugins=[plugin])
    seen = plugin.before.seen
    assert seen[1].keys() == seen[2].keys()
    assert all(torch.equal(seen[1][one], seen[2][one]) for one in seen[1])
    now = everything(plugin.trainer)
    assert any(not torch.equal(seen[2][one], now[one]) for one in now)
    assert [event["step"] for event in events()] == [2]
    assert all_finite()
