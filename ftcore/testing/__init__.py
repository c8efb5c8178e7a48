"""The contract kit: test classes that a plugin's own tests subclass in three lines.

    from ftcore.testing import ModelContract

    pytest_plugins = ["ftcore.testing"]


    class TestOlmo2(ModelContract):
        plugin = "model/acme_olmo2"

There is one contract per kind of plugin. Each starts from :class:`PluginContract` and adds what the rest of ftcore
relies on; class attributes say what a plugin needs to be tried. Everything runs on tiny random models, so nothing is
downloaded and no GPU is needed. `pytest_plugins` brings the fixture `run_dir` and, without a GPU, Triton's interpreter.

PYTEST_DONT_REWRITE: this module is imported before pytest sees `pytest_plugins`, and it asserts nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before the imports below: a contract's bare `assert` should show its values in the plugin's own test run.
pytest.register_assert_rewrite(
    *(
        f"ftcore.testing.{name}"
        for name in (
            "adapter",
            "data",
            "export",
            "extra",
            "generator",
            "kernels",
            "maths",
            "model",
            "plugin",
            "quantizer",
            "reward",
            "trainer",
        )
    )
)

from ftcore.testing.adapter import AdapterContract  # noqa: E402
from ftcore.testing.data import DataContract  # noqa: E402
from ftcore.testing.environment import Environment  # noqa: E402
from ftcore.testing.export import ExportContract  # noqa: E402
from ftcore.testing.extra import ExtraContract  # noqa: E402
from ftcore.testing.generator import GeneratorContract  # noqa: E402
from ftcore.testing.kernels import KernelsContract  # noqa: E402
from ftcore.testing.model import ModelContract  # noqa: E402
from ftcore.testing.plugin import PluginContract  # noqa: E402
from ftcore.testing.quantizer import QuantizerContract  # noqa: E402
from ftcore.testing.reward import RewardContract  # noqa: E402
from ftcore.testing.trainer import TrainerContract  # noqa: E402

__all__ = [
    "AdapterContract",
    "DataContract",
    "Environment",
    "ExportContract",
    "ExtraContract",
    "GeneratorContract",
    "KernelsContract",
    "ModelContract",
    "PluginContract",
    "QuantizerContract",
    "RewardContract",
    "TrainerContract",
]

CONTRACTS: dict[str, type[PluginContract]] = {
    "model": ModelContract,
    "quantizer": QuantizerContract,
    "kernels": KernelsContract,
    "adapter": AdapterContract,
    "data": DataContract,
    "trainer": TrainerContract,
    "generator": GeneratorContract,
    "reward": RewardContract,
    "export": ExportContract,
    "extra": ExtraContract,
}
"""Kind to its contract."""


def pytest_configure() -> None:
    """Two choices that have to be made before torch and Triton are imported.

    Without a GPU, Triton's kernels run in Triton's interpreter. And tiny models run on one thread: on several, most of
    the time goes into handing the work over.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not Path("/proc/driver/nvidia/version").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder that does not exist yet; the working directory is the empty folder around it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"
