"""The contract of every reward."""

from typing import ClassVar

from ftcore.testing import RewardContract

pytest_plugins = ["ftcore.testing"]


class TestLength(RewardContract):
    plugin = "reward/length"


class TestFormat(RewardContract):
    plugin = "reward/format"


class TestJsonSchema(RewardContract):
    plugin = "reward/json_schema"
    settings = ("reward.json_schema.schema={type:object,required:[answer]}",)


class TestMath(RewardContract):
    plugin = "reward/math"
    columns: ClassVar = {"answer": "12"}


class TestReasoningGym(RewardContract):
    plugin = "reward/reasoning_gym"
    columns: ClassVar = {"question": "5 + 7 =", "answer": "12", "metadata": '{"source_dataset": "chain_sum"}'}


class TestRegex(RewardContract):
    plugin = "reward/regex"
    settings = (r"reward.regex.pattern='\d+'",)
