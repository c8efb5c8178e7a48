"""What may be given as the words of a config."""

from __future__ import annotations

from typing import Any

import pytest

import ftcore
from ftcore.composition import compose, parse
from ftcore.errors import Refused


@pytest.mark.parametrize("call", [ftcore.run, ftcore.load, ftcore.compose])
@pytest.mark.parametrize(
    ("given", "message", "fix"),
    [
        ("+model=smollm2 model.tiny=true", "config: is a string", 'give a list of overrides: ["+model=smollm2", ...]'),
        ("", "config: is a string", '["+model=NAME", ...]'),
        (None, "config: takes a list of words, and this is a NoneType", '["+model=NAME", ...]'),
        ({"model": "smollm2"}, "config: takes a list of words, and this is a dict", '["+model=NAME", ...]'),
        (3, "config: takes a list of words, and this is a int", "give a list"),
        ([["+model=smollm2"]], "config[0]: takes a word, and this is a list", "put its words into one list"),
        (["+model=smollm2", 3], "config[1]: takes a word, and this is a int", "give a list of words"),
        (
            ["+model=smollm2 model.tiny=true"],
            "config: holds 2 overrides in one word: +model=smollm2 model.tiny=true",
            'give each as a word of its own: "+model=smollm2", "model.tiny=true"',
        ),
        (["+export=[adapter]  output_dir=here"], "config: holds 2 overrides in one word", '"output_dir=here"'),
    ],
)
def test_what_is_no_list_of_words_is_refused(call: Any, given: Any, message: str, fix: str) -> None:
    with pytest.raises(Refused) as refused:
        call(given)
    first, second = str(refused.value).split("\n")
    assert first.startswith(message)
    assert second.startswith("    fix: ")
    assert fix in second


def test_a_secret_in_one_of_several_is_not_repeated() -> None:
    secret = "hf_" + "a1B2" * 8
    with pytest.raises(Refused) as refused:
        compose([f"+model=smollm2 model.tiny=true output_dir={secret}"])
    assert secret not in str(refused.value)


@pytest.mark.parametrize("word", ['prompts=["a data=b","c"]', "output_dir=my data", 'output_dir="a data=b"'])
def test_a_value_with_spaces_is_one_word(word: str) -> None:
    assert len(parse([word])) == 1


def test_any_sequence_is_taken() -> None:
    assert compose(("+model=smollm2", "model.tiny=true")) == compose(["+model=smollm2", "model.tiny=true"])
