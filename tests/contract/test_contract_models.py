"""The contract of every model family."""

from ftcore.testing import ModelContract

pytest_plugins = ["ftcore.testing"]


class TestLlama(ModelContract):
    plugin = "model/llama"


class TestQwen3(ModelContract):
    plugin = "model/qwen3"


class TestSmolLM2(ModelContract):
    plugin = "model/smollm2"
