"""The contract of every data format."""

from ftcore.testing import DataContract

pytest_plugins = ["ftcore.testing"]


class TestAlpaca(DataContract):
    plugin = "data/alpaca"
    bad_rows = (
        {"instruction": "Say hello."},
        {"instruction": "Say hello.", "output": 3},
        {"instruction": None, "output": "Hi"},
    )


class TestAuto(DataContract):
    plugin = "data/auto"


class TestMessages(DataContract):
    plugin = "data/messages"
    bad_rows = (
        {"messages": "Hello"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"messages": [{"role": "robot", "content": "Hello"}]},
    )


class TestPrompts(DataContract):
    plugin = "data/prompts"
    bad_rows = ({"answer": "4"}, {"prompt": [{"role": "assistant", "content": "Hello"}]})


class TestShareGPT(DataContract):
    plugin = "data/sharegpt"
    bad_rows = ({"conversations": [{"from": "human", "value": "Hello"}]}, {"conversations": [{"from": "gpt"}]})


class TestText(DataContract):
    plugin = "data/text"
    bad_rows = ({"text": 3}, {"text": " \n"}, {"text": None})
