"""The contract of every generator."""

from pathlib import Path

import fake_vllm
import pytest

from ftcore.testing import GeneratorContract

pytest_plugins = ["ftcore.testing"]


class TestFast(GeneratorContract):
    plugin = "generator/fast"


class TestFastWithoutAdapter(GeneratorContract):
    plugin = "generator/fast"
    settings = ("adapter=full",)


class TestTransformers(GeneratorContract):
    plugin = "generator/transformers"


class OnFakeVllm(GeneratorContract):
    @pytest.fixture(autouse=True)
    def fake(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        fake_vllm.install(tmp_path, monkeypatch)


class TestVllm(OnFakeVllm, GeneratorContract):
    plugin = "generator/vllm"


class TestVllmWithoutAdapter(OnFakeVllm, GeneratorContract):
    plugin = "generator/vllm"
    settings = ("adapter=full",)
