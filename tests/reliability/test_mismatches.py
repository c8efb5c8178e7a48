"""Tokenizer, template, model and adapter that do not fit: twelve seeded faults, each found within two seconds."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ftcore import hookimpl, pipeline
from ftcore import hooks as h
from ftcore.composition import compose, typed
from ftcore.errors import Refused
from ftcore.mismatches import Mismatch, check_tokenizer, mismatches

WORDS = ("+model=qwen3", "+trainer=sft", "model.path=model")
EOS, OPEN = "<|im_end|>", "<|im_start|>"
CHATML = (
    "{{% for m in messages %}}{begin}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}{end}\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}{begin}<|im_start|>assistant\n{{% endif %}}"
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which everything fits."""
    from ftcore import checkpoint

    _, plan = pipeline.prepare(typed(compose([*WORDS[:2], "model.tiny=true"])))
    assert plan.run.model is not None
    folder = tmp_path_factory.mktemp("sound") / "model"
    shutil.copytree(checkpoint.locate(plan.run.model, plan.family), folder)
    edit(folder / "config.json", vocab_size=259)
    return folder


@pytest.fixture
def model(sound: Path, in_tmp: Path) -> Path:
    """A copy of it to break."""
    shutil.copytree(sound, "model")
    return Path("model")


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **values}))


def template(model: Path, text: str) -> None:
    (model / "chat_template.jinja").write_text(text)


def chatml(end: str = EOS, begin: str = "") -> str:
    return CHATML.format(end=end, begin=begin)


def found(*overrides: str) -> list[Mismatch]:
    hooks, plan = pipeline.prepare(typed(compose([*WORDS, *overrides])))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    started = time.monotonic()
    all_found = mismatches(plan, tokenizer)
    assert time.monotonic() - started < 2
    return all_found


def adapter(model: Path) -> Path:
    """A folder as a run leaves it beside an adapter's weights."""
    folder = Path("adapter")
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": [], "lora_dropout": 0.0}
    edit(folder / "adapter_config.json", **settings)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model / name, folder / name)
    return folder


def add_token(folder: Path, word: str, number: int) -> None:
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    edit(folder / "tokenizer.json", added_tokens=[*tokens, {"id": number, "content": word, **plain}])


def a_smaller_embedding(model: Path) -> list[str]:
    edit(model / "config.json", vocab_size=258)
    return []


def test_a_special_token_that_no_row_gets_needs_no_row_in_the_embedding(model: Path) -> None:
    """As in Gemma 3 1B, whose tokenizer has one token more than the embedding: that of images."""
    add_token(model, "<image>", 259)
    edit(model / "tokenizer_config.json", image_token="<image>", extra_special_tokens={"image_token": "<image>"})
    one = next(one for one in found() if "the embedding" in one.problem.message)
    assert "'<image>'" in one.problem.message and not one.fatal


def a_padding_token_without_a_row(model: Path) -> list[str]:
    edit(model / "tokenizer_config.json", pad_token="<my_pad>")
    return []


def an_adapter_with_new_tokens(model: Path) -> list[str]:
    add_token(adapter(model), "<new>", 259)
    return ["adapter.path=adapter"]


def an_adapter_with_tokens_in_another_order(model: Path) -> list[str]:
    folder = adapter(model)
    add_token(folder, "<a>", 259)
    add_token(folder, "<b>", 260)
    edit(folder / "adapter_config.json", trainable_token_indices={"embed_tokens": [259, 260]})
    edit(model / "config.json", vocab_size=300)
    return ["adapter.path=adapter", 'model.new_tokens=["<b>","<a>"]']


def an_adapter_of_another_template(model: Path) -> list[str]:
    adapter(model)
    return ["adapter.path=adapter", "data.template=smollm2"]


def another_end(model: Path) -> list[str]:
    add_token(model, "<|done|>", 259)
    edit(model / "config.json", vocab_size=260)
    template(model, chatml(end="<|done|>"))
    return []


def padding_that_is_the_unknown_token(model: Path) -> list[str]:
    edit(model / "tokenizer_config.json", unk_token="<|pad|>", pad_token="<|pad|>")
    return []


def two_begin_tokens(model: Path) -> list[str]:
    edit(model / "tokenizer_config.json", bos_token=OPEN)
    template(model, "{{ bos_token }}" + chatml())
    return []


def control_tokens_that_are_split(model: Path) -> list[str]:
    template(model, chatml(begin="<|header|>"))
    return []


def marks_around_the_question(model: Path) -> list[str]:
    marked = "{% generation %}{{ m.content }}{% endgeneration %}"
    either = f"{{% if m.role == 'user' %}}{marked}{{% else %}}{{{{ m.content }}}}{{% endif %}}"
    template(model, chatml().replace("{{ m.content }}", either))
    return []


def marks_around_the_question_that_count(model: Path) -> list[str]:
    marks_around_the_question(model)
    text = (model / "chat_template.jinja").read_text()
    template(model, text.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"))
    return []


def turns_that_are_written_anew(model: Path) -> list[str]:
    last = "{{ m.content }}{{ '!' if loop.last and m.role == 'assistant' }}"
    template(model, chatml().replace("{{ m.content }}", last))
    return []


FAULTS: dict[Callable[[Path], list[str]], tuple[bool, str]] = {
    a_smaller_embedding: (True, "the tokenizer has 1 tokens that the embedding of 258 rows does not ('<|im_end|>')"),
    a_padding_token_without_a_row: (True, "the embedding of 259 rows does not ('<my_pad>')"),
    an_adapter_with_new_tokens: (True, "the adapter was trained with 1 tokens that the tokenizer does not have: <new>"),
    an_adapter_with_tokens_in_another_order: (True, "'<a>' is token 259 of the adapter's tokenizer, and token 260"),
    an_adapter_of_another_template: (False, "the adapter was trained with another chat template"),
    another_end: (False, "an answer ends with '<|done|>', but generation stops at '<|im_end|>'"),
    padding_that_is_the_unknown_token: (False, "the padding token is the unknown token '<|pad|>'"),
    two_begin_tokens: (False, "the template writes the begin token '<|im_start|>' twice"),
    control_tokens_that_are_split: (False, "the template writes '<|header|>', which the tokenizer reads as 10 tokens"),
    marks_around_the_question: (False, "marks stand around 'Why?And then?'"),
    marks_around_the_question_that_count: (True, "marks stand around 'Why?And then?'"),
    turns_that_are_written_anew: (False, "the template writes earlier turns otherwise once a conversation goes on"),
}
"""What breaks it, to whether a run ends by it, and a part of what is said."""


def test_what_fits_is_left_alone(model: Path) -> None:
    assert found() == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_is_found(fault: Callable[[Path], list[str]], model: Path) -> None:
    fatal, said = FAULTS[fault]
    made = found(*fault(model))
    assert [said in one.problem.message for one in made].count(True) == 1, [one.problem.message for one in made]
    one = next(one for one in made if said in one.problem.message)
    assert one.fatal is fatal
    assert one.problem.fix


def test_a_run_ends_before_the_weights_or_is_warned(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ftcore

    @hookimpl
    def ftcore_load_model() -> None:
        raise AssertionError("weights are read")

    a_smaller_embedding(model)
    with pytest.raises(Refused, match="the embedding of 258 rows"):
        ftcore.run([*WORDS], plugins=[ftcore_load_model])
    edit(model / "config.json", vocab_size=259)
    turns_that_are_written_anew(model)
    with pytest.raises(AssertionError, match="weights are read"):
        ftcore.run([*WORDS], plugins=[ftcore_load_model])
    assert capsys.readouterr().out.count("warning: data.template: the template writes earlier turns") == 1


def test_shipped_families_fit_their_own_tokenizers() -> None:
    """Tiny models have a stand-in of a tokenizer; the real one that is at hand is SmolLM2's."""
    hooks, plan = pipeline.prepare(typed(compose(["+model=smollm2", "+trainer=sft"])))
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    check_tokenizer(plan, tokenizer)
    assert mismatches(plan, tokenizer) == []
