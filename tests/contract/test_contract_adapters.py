"""The contract of every adapter."""

from ftcore.testing import AdapterContract

pytest_plugins = ["ftcore.testing"]


class TestFull(AdapterContract):
    plugin = "adapter/full"


class TestLora(AdapterContract):
    plugin = "adapter/lora"


class TestDora(AdapterContract):
    plugin = "adapter/lora"
    settings = ("adapter.variant=dora",)


class TestRankStabilizedLora(AdapterContract):
    plugin = "adapter/lora"
    settings = ("adapter.variant=rslora",)


class TestPissa(AdapterContract):
    plugin = "adapter/lora"
    settings = ("adapter.init=pissa",)


class TestOlora(AdapterContract):
    plugin = "adapter/lora"
    settings = ("adapter.init=olora",)
