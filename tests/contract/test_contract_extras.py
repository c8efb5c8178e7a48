"""The contract of every extra."""

import json
from pathlib import Path

import pytest

from ftcore.testing import ExtraContract

pytest_plugins = ["ftcore.testing"]


class TestJsonl(ExtraContract):
    plugin = "extra/jsonl"
    settings = ("extra.jsonl.path=all.jsonl",)

    def after_run(self, run_dir: Path) -> None:
        lines = (run_dir.parent / "all.jsonl").read_text(encoding="utf-8").splitlines()
        assert len([line for line in lines if "loss" in json.loads(line)]) == 2


class TestTrackio(ExtraContract):
    plugin = "extra/trackio"

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
