"""What a tracker is sent, and what its own reader finds afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import ftcore

WORDS = (
    "+model=llama",
    "model.tiny=true",
    "+trainer=sft",
    "trainer.max_steps=2",
    "trainer.global_batch=4",
    "trainer.max_length=128",
    "data.eval_size=4",
    "sampling.max_new_tokens=1",
    "output_dir=run",
)


def metrics(name: str) -> list[tuple[int, float]]:
    """Steps and values that the run's own file has."""
    entries = map(json.loads, Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [(entry["step"], entry[name]) for entry in entries if name in entry]


class Recorder:
    """A tracker that keeps what it is told, or fails at it."""

    def __init__(self, fails_at: str = "") -> None:
        self.heard: list[tuple[object, ...]] = []
        self.fails_at = fails_at

    def start(self, settings) -> None:
        self.told("start", settings)

    def log(self, values, step) -> None:
        self.told("log", step, values)

    def finish(self) -> None:
        self.told("finish")

    def told(self, what: str, *values: object) -> None:
        self.heard.append((what, *values))
        if what == self.fails_at:
            raise ConnectionError("down")


def tracked(recorder: Recorder) -> None:
    """A run with that tracker."""
    from ftcore_extras._closing import ftcore_evaluate
    from ftcore_extras._tracker import Tracker

    @ftcore.hookimpl
    def ftcore_callbacks():
        return [Tracker(recorder)]

    ftcore.run(WORDS, plugins=[SimpleNamespace(ftcore_callbacks=ftcore_callbacks, ftcore_evaluate=ftcore_evaluate)])


def test_a_tracker_gets_everything_from_before_the_first_step_to_after_the_last(in_tmp: Path) -> None:
    recorder = Recorder()
    tracked(recorder)
    (kind, settings), *logged, last = recorder.heard
    assert (kind, last) == ("start", ("finish",))
    assert settings["max_steps"] == 2
    assert {what for what, *_ in logged} == {"log"}
    for name in ("loss", "eval_loss"):
        assert [(step, values[name]) for _, step, values in logged if name in values] == metrics(name)
    assert [step for step, _ in metrics("eval_loss")] == [0, 2]


@pytest.mark.parametrize(("fails_at", "calls"), [("start", 1), ("log", 2), ("finish", 7)])
def test_a_tracker_that_fails_is_told_nothing_more(in_tmp: Path, capsys, fails_at: str, calls: int) -> None:
    recorder = Recorder(fails_at)
    tracked(recorder)
    assert len(recorder.heard) == calls
    assert capsys.readouterr().out.count("tracker switched off: ConnectionError: down; metrics.jsonl goes on") == 1
    assert [step for step, _ in metrics("eval_loss")] == [0, 2]


def run_with(extra: str, capsys, *words: str) -> None:
    """A run with a tracker of a package, which takes everything."""
    ftcore.run([*WORDS, f"+extra=[{extra}]", *words])
    assert "switched off" not in capsys.readouterr().out


def test_trackio(in_tmp: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):  # TRACKIO_DIR is read when trackio is imported
        monkeypatch.setattr(module, "TRACKIO_DIR", in_tmp / "trackio")
    run_with("trackio", capsys)
    rows = trackio.sqlite_storage.SQLiteStorage.get_logs("ftcore", "run")
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == metrics("eval_loss")


def test_tensorboard(in_tmp: Path, capsys) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with("tensorboard", capsys)
    read = EventAccumulator("run/tensorboard").Reload()
    for name in ("loss", "eval_loss"):
        found, kept = read.Scalars(name), metrics(name)
        assert [event.step for event in found] == [step for step, _ in kept]
        assert [event.value for event in found] == pytest.approx([value for _, value in kept])  # kept in float32
    assert "max_steps: 2" in str(read.Tensors("settings/text_summary"))


def test_wandb_offline(in_tmp: Path, capsys) -> None:
    pytest.importorskip("wandb")
    run_with("wandb", capsys, "extra.wandb.mode=offline", "extra.wandb.project=trials")
    (file,) = Path("run/wandb").glob("offline-run-*/run-*.wandb")
    written = file.read_bytes()
    assert b"trials" in written
    for step, value in metrics("eval_loss"):
        assert json.dumps(value).encode() in written, f"eval_loss of step {step} is not there"


def test_mlflow(in_tmp: Path, capsys) -> None:
    mlflow = pytest.importorskip("mlflow")
    run_with("mlflow", capsys, "extra.mlflow.experiment=trials")
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("trials").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["max_steps"]) == ("run", "FINISHED", "2")
    for name in ("loss", "eval_loss"):
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] == metrics(name)
