"""The contract of every model family."""

from ftcore.testing import ModelContract

pytest_plugins = ["ftcore.testing"]


class TestGemma2(ModelContract):
    plugin = "model/gemma2"


class TestGemma3(ModelContract):
    plugin = "model/gemma3"


class TestLlama(ModelContract):
    plugin = "model/llama"


class TestMistral(ModelContract):
    plugin = "model/mistral"


class TestPhi3(ModelContract):
    plugin = "model/phi3"


class TestQwen2(ModelContract):
    plugin = "model/qwen2"


class TestQwen3(ModelContract):
    plugin = "model/qwen3"


class TestSmolLM2(ModelContract):
    plugin = "model/smollm2"
