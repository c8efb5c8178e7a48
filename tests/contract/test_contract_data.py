"""The contract of every data format."""

from ftcore.testing import DataContract, runs

pytest_plugins = ["ftcore.testing"]

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi"}


class TestAlpaca(DataContract):
    plugin = "data/alpaca"
    bad_rows = (
        {"instruction": "Say hello."},
        {"instruction": "Say hello.", "output": 3},
        {"instruction": None, "output": "Hi"},
        {"instruction": "Say hello.", "output": "Hi", "image": "x.png"},
    )


class TestAudio(DataContract):
    plugin = "data/audio"
    bad_rows = ({"audio": "x.wav"}, {"audio": 3, "text": "a"}, {"audio": None, "text": "a"}, {"audio": {}, "text": "a"})


class TestAuto(DataContract):
    plugin = "data/auto"


class TestCodes(DataContract):
    plugin = "data/codes"
    bad_rows = (
        {"codes": [1, 2, 3, 4, 5, 6, 7]},
        {"codes": [1, 2, 3, 4, 5, 6], "text": "a"},
        {"codes": [1, 2, 3, 4, 5, 6, 4096], "text": "a"},
        {"codes": [1, 4097, 3, 4, 5, 6, 7], "text": "a"},
        {"codes": [1, 9000, 3, 4, 5, 6, 7], "text": "a"},
        {"codes": [[1], [2, 3], [4, 5, 6]], "text": "a"},
        {"codes": [1.5, 2, 3, 4, 5, 6, 7], "text": "a"},
        {"codes": "1 2 3 4 5 6 7", "text": "a"},
    )


class TestImages(DataContract):
    plugin = "data/images"
    bad_rows = (
        {"images": ["x.png"], "messages": [USER]},
        {"images": [], "messages": [USER, ANSWER]},
        {"images": ["x.png", "y.png"], "messages": [{"role": "user", "content": "<image> Hi"}, ANSWER]},
        {"images": [3], "messages": [USER, ANSWER]},
        {"image": "x.png", "text": "a cat"},
    )


class TestLabels(DataContract):
    plugin = "data/labels"
    bad_rows = (
        {"text": "a", "label": None},
        {"text": "a", "label": ""},
        {"text": "a", "label": {"x": 1}},
        {"text": "a"},
    )


class TestMessages(DataContract):
    plugin = "data/messages"
    bad_rows = (
        {"messages": "Hello"},
        {"messages": []},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"messages": [{"role": "robot", "content": "Hello"}]},
        {"messages": [USER, ANSWER], "images": ["x.png"]},
        {"messages": [USER, {**ANSWER, "weight": 0}]},
        {"messages": [USER, {**ANSWER, "weight": "high"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "no"}]}]},
    )


class TestPairs(DataContract):
    plugin = "data/pairs"
    bad_rows = (
        {"anchor": "a"},
        {"sentence1": "a", "sentence2": "b"},
        {"sentence1": "a", "sentence2": "b", "score": "high"},
        {"anchor": "a", "positive": "b", "negative": ""},
    )


class TestPreference(DataContract):
    plugin = "data/preference"
    bad_rows = (
        {"prompt": "a", "chosen": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": [ANSWER]},
        {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "Bye"}, ANSWER]},
        {"chosen": [USER], "rejected": [USER]},
    )


class TestPromptCompletion(DataContract):
    plugin = "data/prompt_completion"
    bad_rows = (
        {"prompt": "a"},
        {"prompt": "a", "completion": [ANSWER]},
        {"prompt": [USER], "completion": [USER, ANSWER]},
        {"prompt": [USER, ANSWER], "completion": [ANSWER]},
        {"prompt": "a", "completion": "b", "system": "c"},
    )


class TestPrompts(DataContract):
    plugin = "data/prompts"
    bad_rows = ({"answer": "4"}, {"prompt": [{"role": "assistant", "content": "Hello"}]})


class TestReasoningGym(DataContract):
    plugin = "data/reasoning_gym"
    bad_rows = (
        {"question": "2 + 2 =", "answer": "4"},
        {"question": " ", "answer": "4", "metadata": {"source_dataset": "chain_sum"}},
        {"question": "2 + 2 =", "answer": "4", "metadata": {}},
        {"question": "2 + 2 =", "answer": "4", "metadata": "import os"},
    )


class TestShareGPT(DataContract):
    plugin = "data/sharegpt"
    bad_rows = (
        {"conversations": [{"from": "human", "value": "Hello"}]},
        {"conversations": [{"from": "gpt"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "no"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": 3},
    )


class TestStepwise(DataContract):
    plugin = "data/stepwise"
    bad_rows = (
        {"prompt": "a", "completions": ["b"], "labels": [True, False]},
        {"prompt": "a", "completions": ["b"], "labels": ["maybe"]},
        {"prompt": "a", "completions": "b", "labels": True},
    )


class TestText(DataContract):
    plugin = "data/text"
    bad_rows = ({"text": 3}, {"text": " \n"}, {"text": None}, {"text": "a", "image": "x.png"})


class TestTokens(DataContract):
    plugin = "data/tokens"
    bad_rows = (
        {"input_ids": []},
        {"input_ids": [1.5]},
        {"input_ids": [-1]},
        {"input_ids": [1, 2], "labels": [1]},
        {"input_ids": [1, 2], "labels": [2, -100]},
    )


class TestTools(DataContract):
    plugin = "data/tools"
    base = (*runs.TINY, "data.template=qwen3")
    bad_rows = (
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "tools": "no"},
        {"messages": [USER, ANSWER], "tools": [{"description": "nameless"}]},
    )


class TestUnpaired(DataContract):
    plugin = "data/unpaired"
    bad_rows = (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b", "label": "good"},
        {"messages": [USER], "label": True},
        {"messages": [USER, ANSWER, USER], "label": True},
    )
