"""Shared by all tests: offline, a cache of their own, and small helpers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The first chooses Triton's interpreter where there is no GPU, before anything imports Triton.
pytest_plugins = ["ftcore.testing", "few"]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, instead of every worker on all of them
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


Shell = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ftcore_cli(in_tmp: Path) -> Shell:
    """Run the real command line in a process of its own, in a fresh directory."""

    def call(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ftcore", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=in_tmp, check=False, **options)  # type: ignore[call-overload,no-any-return]

    return call
