"""The contract of every extra."""

import json
from pathlib import Path

import pytest

from ftcore.testing import ExtraContract

pytest_plugins = ["ftcore.testing"]

OPTIONAL = ("mlflow", "tensorboard", "wandb")
"""Extras whose packages need not be there."""
RUNS = ("test_callbacks_are_callbacks", "test_run_goes_through")
"""The parts of the contract that need the package."""


@pytest.fixture(autouse=True)
def _package(request: pytest.FixtureRequest) -> None:
    name = request.cls.plugin.rpartition("/")[2]
    if name in OPTIONAL and request.node.originalname in RUNS:
        pytest.importorskip(name)


class TestJsonl(ExtraContract):
    plugin = "extra/jsonl"
    settings = ("extra.jsonl.path=all.jsonl",)

    def after_run(self, run_dir: Path) -> None:
        lines = (run_dir.parent / "all.jsonl").read_text(encoding="utf-8").splitlines()
        assert len([line for line in lines if "loss" in json.loads(line)]) == 2


class TestMlflow(ExtraContract):
    plugin = "extra/mlflow"

    @pytest.fixture(autouse=True)
    def _own_folder(self, in_tmp: Path) -> None:
        """The database is made in the working directory."""

    def after_run(self, run_dir: Path) -> None:
        assert Path("mlflow.db").is_file()


class TestTensorboard(ExtraContract):
    plugin = "extra/tensorboard"

    def after_run(self, run_dir: Path) -> None:
        assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))


class TestWandb(ExtraContract):
    plugin = "extra/wandb"
    settings = ("extra.wandb.mode=offline",)

    def after_run(self, run_dir: Path) -> None:
        assert list((run_dir / "wandb").glob("offline-run-*"))


class TestTrackio(ExtraContract):
    plugin = "extra/trackio"

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
