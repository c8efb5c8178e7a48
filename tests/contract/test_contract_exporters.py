"""The contract of every exporter, and for those whose artifact transformers or PEFT reads, that it is the model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import asked_instead, served

from ftcore.specs import Artifact, Loaded
from ftcore.testing import ExportContract

pytest_plugins = ["ftcore.testing"]


class TestAdapter(ExportContract):
    plugin = "export/adapter"
    settings = ("export.adapter.verify=false",)

    def reload(self, artifact: Artifact, loaded: Loaded) -> Any:
        from peft import PeftModel

        from ftcore.testing import runs

        plain = runs.loaded([*self.base, "adapter=full", "kernels=[]"]).model
        return PeftModel.from_pretrained(plain, artifact.path)


class TestSafetensors(ExportContract):
    plugin = "export/safetensors"
    settings = ("export.safetensors.dtype=float32", "export.safetensors.verify=false")

    def reload(self, artifact: Artifact, loaded: Loaded) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(artifact.path)


class TestSafetensorsIn16Bits(TestSafetensors):
    settings = ("export.safetensors.verify=false",)
    tolerance = 2e-3


class TestVllm(TestSafetensorsIn16Bits, ExportContract):
    plugin = "export/vllm"
    settings = ("export.vllm.verify=false",)


class TestVllmAdapter(TestAdapter):
    plugin = "export/vllm"
    settings = ("export.vllm.form=adapter", "export.vllm.verify=false")


class TestSglang(TestSafetensorsIn16Bits, ExportContract):
    plugin = "export/sglang"
    settings = ("export.sglang.verify=false",)


class TestBnb8(TestSafetensors, ExportContract):
    plugin = "export/bnb8"
    settings = ("export.bnb8.verify=false",)
    tolerance = 0.03


class TestBnb4(TestSafetensors, ExportContract):
    plugin = "export/bnb4"
    settings = ("export.bnb4.verify=false",)
    tolerance = 0.3


class TestFp8(ExportContract):
    """Weights are off by 2^-5 on average at most; the activations' own rounding is left out here."""

    plugin = "export/fp8"
    settings = ("export.fp8.verify=false",)
    tolerance = 0.06

    def reload(self, artifact: Artifact, loaded: Loaded) -> Any:
        from transformers import AutoModelForCausalLM, CompressedTensorsConfig

        unpack = CompressedTensorsConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(artifact.path, dtype="float32", quantization_config=unpack)


class TestInt4(TestFp8, ExportContract):
    """A step of 4 bits is a seventh of the largest weight of its group."""

    plugin = "export/int4"
    settings = ("export.int4.verify=false",)
    tolerance = 0.25


class TestGguf(ExportContract):
    """Its logits are compared in tests/export, by llama.cpp."""

    plugin = "export/gguf"
    settings = ("export.gguf.verify=false",)


class TestOllama(ExportContract):
    """Its files are compared in tests/export."""

    plugin = "export/ollama"
    settings = ("export.ollama.verify=false",)


class TestHub(ExportContract):
    """Against a hub on this machine; what is sent is compared in tests/export."""

    plugin = "export/hub"
    settings = ("export.hub.repo_id=me/pebble",)

    @pytest.fixture(autouse=True)
    def _hub(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        with served() as hub:
            asked_instead(hub, monkeypatch)
            yield

    def selected(self) -> list[str]:
        return ["+export=[adapter,hub]", "export.adapter.verify=false", *self.settings]

    def exported(self, run_dir: Path) -> tuple[list[Artifact], Loaded]:
        artifacts, loaded = super().exported(run_dir)
        return sorted(artifacts, key=lambda artifact: artifact.target), loaded

    def reload(self, artifact: Artifact, loaded: Loaded) -> Any:
        return TestAdapter.reload(self, artifact, loaded)  # type: ignore[arg-type]
