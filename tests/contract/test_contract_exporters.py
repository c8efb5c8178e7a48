"""The contract of every exporter, and for those whose artifact transformers or PEFT reads, that it is the model."""

from typing import Any

from ftcore.specs import Artifact, Loaded
from ftcore.testing import ExportContract

pytest_plugins = ["ftcore.testing"]


class TestAdapter(ExportContract):
    plugin = "export/adapter"

    def reload(self, artifact: Artifact, loaded: Loaded) -> Any:
        from peft import PeftModel

        from ftcore.testing import runs

        plain = runs.loaded([*self.base, "adapter=full", "kernels=[]"]).model
        return PeftModel.from_pretrained(plain, artifact.path)


class TestSafetensors(ExportContract):
    plugin = "export/safetensors"
    settings = ("export.safetensors.dtype=float32",)

    def reload(self, artifact: Artifact, loaded: Loaded) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(artifact.path)


class TestSafetensorsIn16Bits(TestSafetensors):
    settings = ()
    tolerance = 2e-3
