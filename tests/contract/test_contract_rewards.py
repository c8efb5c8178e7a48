"""The contract of every reward."""

from ftcore.testing import RewardContract

pytest_plugins = ["ftcore.testing"]


class TestLength(RewardContract):
    plugin = "reward/length"
