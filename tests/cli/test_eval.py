"""`ftcore eval`: the numbers of the run itself, before and after, and nothing of the run changed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ftcore
from ftcore import cli, pipeline
from ftcore.catalog import installed

TINY = ("+model=qwen3", "model.tiny=true")
SHORT = ("trainer.max_steps=3", "trainer.global_batch=4", "trainer.learning_rate=5e-3", "prompts=[]")
ROWS = [{"prompt": f"What is {n} and {n}?", "completion": f"It is {2 * n}, I am sure."} for n in range(12)]

Runs = Callable[..., Path]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def trained(in_tmp: Path) -> Runs:
    """A run of three steps on eight rows, with four held out."""
    write_rows(in_tmp / "rows.jsonl", ROWS[:8])
    write_rows(in_tmp / "held.jsonl", ROWS[8:])

    def run(folder: str, *words: str, trainer: str = "sft") -> Path:
        data = () if any(w.startswith("data") for w in words) else ("data.path=rows.jsonl", "data.eval_path=held.jsonl")
        ftcore.run([*TINY, f"+trainer={trainer}", *SHORT, *data, *words, f"output_dir={folder}"])
        return Path(folder)

    return run


def evaluate(*words: str) -> None:
    assert cli.run(["eval", *words]) == 0


def outcome(folder: Path, name: str = "eval.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def recorded(folder: Path) -> dict[str, float]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]


def assert_recorded(folder: Path, measures: tuple[str, ...]) -> None:
    """What is measured now is what the run itself measured."""
    found, metrics = outcome(folder), recorded(folder)
    for name in ("loss", *measures):
        assert found["before"][name] == pytest.approx(metrics[f"eval_{name}_before"], rel=1e-5, abs=1e-6), name
        assert found["after"][name] == pytest.approx(metrics[f"eval_{name}"], rel=1e-5, abs=1e-6), name


def files(folder: Path) -> dict[str, str]:
    found = (f for f in folder.rglob("*") if f.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def test_before_and_after_are_the_run_s_own_and_its_folder_stays(trained: Runs, in_tmp: Path, capsys) -> None:
    folder = trained("demo", "trainer.save_steps=2")
    before = files(in_tmp)
    (in_tmp / "rows.jsonl").rename(in_tmp / "gone.jsonl")  # training rows are not read
    capsys.readouterr()
    evaluate("run=demo")
    said = capsys.readouterr().out
    (in_tmp / "gone.jsonl").rename(in_tmp / "rows.jsonl")
    assert_recorded(folder, ("perplexity", "mean_token_accuracy"))
    found = outcome(folder)
    assert found["after"]["loss"] < found["before"]["loss"] - 0.1
    assert found["after"]["perplexity"] == pytest.approx(math.exp(found["after"]["loss"]))
    assert (found["run"], found["eval_path"], found["rows"]) == ("demo", "held.jsonl", 4)
    loss = [f"{found[when]['loss']:.4g}" for when in ("before", "after")]
    lines = [line.split() for line in said.splitlines()]
    assert lines[1:4] == [
        ["Measured", "on", "4", "held-out", "rows", "of", "held.jsonl"],
        ["metric", "before", "after"],
        ["loss", *loss],
    ]
    assert [line[0] for line in lines[4:6]] == ["perplexity", "mean_token_accuracy"]
    assert lines[-1] == ["written:", "demo/eval.json"]
    evaluate("run=demo")
    after = files(in_tmp)
    assert after.keys() - before.keys() == {"demo/eval.json", "demo/eval-2.json"}
    assert {name: after[name] for name in before} == before
    assert outcome(folder, "eval-2.json") == outcome(folder)


@pytest.mark.parametrize(
    "words",
    [
        ("adapter=full", "model.new_tokens=[abc]"),
        ("adapter.variant=dora", "adapter.modules_to_save=[lm_head]"),
        ("adapter.init=pissa", "model.new_tokens=[abc]"),
        ("+quantizer=bnb_nf4",),
        ("data=alpaca", "data.eval_size=4"),
    ],
    ids=["full", "dora", "pissa", "nf4", "eval_size"],
)
def test_every_adapter_s_start_and_end(trained: Runs, words: tuple[str, ...]) -> None:
    folder = trained("demo", *words)
    evaluate("run=demo")
    assert_recorded(folder, ("perplexity", "mean_token_accuracy"))
    assert outcome(folder)["after"]["loss"] < outcome(folder)["before"]["loss"]


def test_a_run_from_a_saved_adapter_starts_there(trained: Runs) -> None:
    first = trained("first")
    second = trained("second", "adapter.path=first/trained", "trainer.seed=7")
    evaluate("run=second")
    assert_recorded(second, ("perplexity",))
    assert outcome(second)["before"]["loss"] == pytest.approx(recorded(first)["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_reference_model_stays_the_start(trained: Runs, adapter: str) -> None:
    folder = trained("demo", "data=preference", "data.eval_size=4", f"adapter={adapter}", trainer="dpo")
    evaluate("run=demo")
    assert_recorded(folder, ("rewards/accuracies",))
    found = outcome(folder)
    assert found["before"]["loss"] == pytest.approx(math.log(2))
    assert abs(found["after"]["rewards/margins"]) > 1e-3


def test_a_model_with_a_head_of_its_own(trained: Runs) -> None:
    folder = trained("demo", "data=labels", "data.eval_size=4", trainer="classify")
    evaluate("run=demo")
    assert_recorded(folder, ("accuracy", "macro_f1"))


def test_completions_are_drawn_alike_before_and_after(trained: Runs) -> None:
    words = ("data=prompts", "data.eval_size=2", "trainer.max_completion_length=6", "trainer.learning_rate=0.1")
    folder = trained("demo", *words, trainer="grpo")
    evaluate("run=demo")
    evaluate("run=demo")
    found = outcome(folder)
    assert {"loss", "reward", "rewards/length/mean"} <= found["after"].keys()
    assert found == outcome(folder, "eval-2.json")
    assert found["after"]["entropy"] != found["before"]["entropy"]


def test_a_value_head_is_measured_as_it_was_trained(trained: Runs) -> None:
    words = ("data=prompts", "data.eval_size=2", "trainer.max_completion_length=6", "trainer.value_learning_rate=0.01")
    folder = trained("demo", *words, trainer="ppo")
    assert (folder / "trained" / "value_head.safetensors").is_file()
    evaluate("run=demo")
    found = outcome(folder)
    assert found["before"]["values"] == 0  # a new one
    assert abs(found["after"]["values"]) > 1e-6


def test_what_a_finished_run_is_not(trained: Runs, capsys) -> None:
    trained("demo")
    assert cli.run(["export", "run=demo", "adapter=full", "+export=[adapter]"]) == 2
    assert "adapter: is full, and the run trained an adapter" in capsys.readouterr().err
    assert cli.run(["export", "run=demo,other", "+export=[adapter]"]) == 2
    assert "run: names several runs" in capsys.readouterr().err


def test_a_part_to_hold_out_cannot_be_set_afterwards(trained: Runs, capsys) -> None:
    trained("demo", "data=alpaca")
    assert cli.run(["eval", "run=demo", "data.eval_size=0.5"]) == 2
    assert "data.eval_size: would hold out rows" in capsys.readouterr().err


def test_a_model_alone(trained: Runs, in_tmp: Path, capsys) -> None:
    metrics = recorded(trained("demo"))
    there = set(in_tmp.iterdir())
    capsys.readouterr()
    words = (*TINY, "+trainer=sft", "data.eval_path=held.jsonl", "trainer.micro_batch=4")
    evaluate(*words)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:4] == [["metric", "value"], ["loss", f"{metrics['eval_loss_before']:.4g}"]]
    assert set(in_tmp.iterdir()) == there
    evaluate(*words, "adapter.path=demo/trained", "output_dir=numbers")
    found = outcome(Path("numbers"))
    assert found["value"]["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert found["run"] is None


class Widest(TorchDispatchMode):
    """The most rows of logits, and the most tokens of a batch, that are ever there at once."""

    def __init__(self) -> None:
        super().__init__()
        tiny = installed().find("model", "qwen3").load().ftcore_model_family().tiny
        self.vocabulary, self.hidden = tiny["vocab_size"], tiny["hidden_size"]
        self.logits = self.tokens = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                if tensor.shape[-1] == self.vocabulary and tensor.shape[0] != self.hidden:
                    self.logits = max(self.logits, tensor.numel() // self.vocabulary)
                if tensor.shape[-1] == self.hidden and tensor.dim() == 3:
                    self.tokens = max(self.tokens, tensor.numel() // self.hidden)
        return out


def test_logits_of_whole_batches_never_exist(in_tmp: Path) -> None:
    long = [{"prompt": "word " * 60, "completion": f"{n} " * 20} for n in range(8)]
    write_rows(in_tmp / "held.jsonl", long)
    with Widest() as seen:
        evaluate(*TINY, "+trainer=sft", "data.eval_path=held.jsonl", "trainer.micro_batch=8")
    assert seen.tokens > 8 * 300
    assert 0 < seen.logits < seen.tokens / 4


@pytest.mark.parametrize(
    ("trainer", "model"),
    [
        ("sft", "qwen3"),
        pytest.param("cpt", "llama", marks=pytest.mark.slow),
        pytest.param("sft", "qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_a_run_reports_perplexity_and_accuracy(in_tmp: Path, capsys, trainer: str, model: str) -> None:
    words = [f"+model={model}", "model.tiny=true", f"+trainer={trainer}", *SHORT, "data.eval_size=4"]
    metrics = ftcore.run(words).metrics
    of_router = 0.001 * metrics.get("eval_aux_loss", 0.0)
    assert (of_router > 0) == (model == "qwen3_moe")
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"] - of_router), rel=1e-6)
    assert metrics["eval_perplexity"] < metrics["eval_perplexity_before"] < math.exp(metrics["eval_loss_before"]) + 1e-6
    assert 0 <= metrics["eval_mean_token_accuracy_before"] <= metrics["eval_mean_token_accuracy"] <= 1
    said = capsys.readouterr().out
    for name in ("eval_perplexity_before", "eval_perplexity", "eval_mean_token_accuracy"):
        assert f"\n  {name} " in said


def test_another_loss_has_no_perplexity(in_tmp: Path) -> None:
    metrics = ftcore.run([*TINY, "+trainer=sft", *SHORT, "trainer.args={loss_type: dft}"]).metrics
    assert "eval_loss" in metrics
    assert "eval_perplexity" not in metrics


def test_rows_of_a_file_that_is_another_by_now_are_not_held_out(trained: Runs, in_tmp: Path, capsys) -> None:
    """Another number of rows is split otherwise: most of them would be rows that were trained on."""
    trained("demo", "data.path=rows.jsonl", "data.eval_size=4")
    evaluate("run=demo")
    write_rows(in_tmp / "rows.jsonl", ROWS)
    capsys.readouterr()
    assert cli.run(["eval", "run=demo"]) == 2
    assert "data.path: is not what it was when the run was trained" in capsys.readouterr().err
    evaluate("run=demo", "data.eval_path=held.jsonl")


NO_ROWS = "    fix: name a file of them: data.eval_path=held.jsonl\n"
ALONE = (*TINY, "+trainer=sft")
WRONG = {
    "run-without-held-out": (("run=demo",), 2, f"data.eval_path: the run held out no rows\n{NO_ROWS}"),
    "no-held-out": ((*ALONE, "data.path=rows.jsonl"), 2, f"data.eval_path: there are no held-out rows\n{NO_ROWS}"),
    "trained-rows": (
        ("run=demo", "data.eval_size=2"),
        2,
        "data.eval_size: would hold out rows that the run was trained on\n"
        "    fix: leave it out, or name rows of their own: data.eval_path=held.jsonl\n",
    ),
    "no-file": (
        ("run=demo", "data.eval_path=heldd.jsonl"),
        66,
        "data.eval_path: there is no file heldd.jsonl\n    fix: did you mean held.jsonl?\n",
    ),
    "bad-row": (
        ("run=demo", "data.eval_path=bad.jsonl", "data=prompt_completion"),
        65,
        "bad.jsonl:1: has no column 'prompt' or 'completion' (it has prompt)\n"
        "    fix: rename the column, or name the format with data=NAME\n",
    ),
    "no-run": (
        ("run=nowhere",),
        66,
        "run: nowhere holds no config.yaml\n    fix: `ftcore runs` lists the run folders\n",
    ),
    "nothing-trained": (
        ("run=failed",),
        66,
        "run: failed holds no trained model\n    fix: it may have failed: `ftcore runs` shows\n",
    ),
    "another-adapter": (
        ("run=demo", "data.eval_path=held.jsonl", "adapter.alpha=64"),
        2,
        "adapter.alpha: was 32.0 when the run was trained\n    fix: leave it out\n",
    ),
    "another-kind-of-adapter": (
        ("run=demo", "data.eval_path=held.jsonl", "adapter=full"),
        2,
        "adapter: was lora when the run was trained\n    fix: leave adapter= out\n",
    ),
    "other-tokens": (
        ("run=demo", "data.eval_path=held.jsonl", "model.new_tokens=[abc]"),
        2,
        "model.new_tokens: was [] when the run was trained\n    fix: leave it out\n",
    ),
    "resume": (("run=demo", "resume=last"), 2, "resume: nothing is trained here\n    fix: leave it out\n"),
    "no-trainer": (
        TINY,
        2,
        "trainer: no trainer is selected, and it is what measures\n"
        "    fix: add +trainer=NAME, or run=RUN; `ftcore plugins trainer` lists them\n",
    ),
    "misspelt": (
        ("run=demo", "trainer.micro_bach=2"),
        2,
        "trainer.micro_bach: sft has no key 'micro_bach'\n    fix: did you mean trainer.micro_batch?\n",
    ),
}


def test_errors_are_said_before_any_weight_is_loaded(trained: Runs, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = trained("demo", "data.path=rows.jsonl")
    write_rows(Path("bad.jsonl"), [{"prompt": "Why?"}])
    Path("failed").mkdir()
    Path("failed/config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    before = files(Path())

    def load(*_: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(pipeline, "load", load)
    for name, (words, code, text) in WRONG.items():
        capsys.readouterr()
        assert cli.run(["eval", *words]) == code, name
        assert capsys.readouterr().err == f"ftcore: {text}", name
    assert files(Path()) == before


def test_weights_of_another_model_are_refused(trained: Runs, capsys) -> None:
    """A run folder whose weights were exchanged."""
    folder, other = trained("demo"), trained("other", "adapter.r=4")
    file = "trained/adapter_model.safetensors"
    (folder / file).write_bytes((other / file).read_bytes())
    capsys.readouterr()
    assert cli.run(["eval", "run=demo"]) == 65
    assert capsys.readouterr().err.endswith(
        "ftcore: run: the weights in demo/trained are not those of the model that the run's config makes\n"
        "    fix: leave model.* and adapter.* as they were\n"
    )
    assert not (folder / "eval.json").exists()
