"""The contract of every trainer."""

from ftcore.testing import TrainerContract

pytest_plugins = ["ftcore.testing"]


class TestSFT(TrainerContract):
    plugin = "trainer/sft"


class TestGRPO(TrainerContract):
    plugin = "trainer/grpo"
    settings = ("trainer.max_completion_length=8", "trainer.num_generations=2")
    falls = False
