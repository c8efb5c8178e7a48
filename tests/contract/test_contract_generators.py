"""The contract of every generator."""

from ftcore.testing import GeneratorContract

pytest_plugins = ["ftcore.testing"]


class TestTransformers(GeneratorContract):
    plugin = "generator/transformers"
