"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer does: told by the tokenizer's own parts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ftcore.errors import Problem, Refused

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{end}|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{end}"
)
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r""" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}"
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = _CASED.replace("{end}", "") + r"|\p{N}|" + _CASED_REST
O200K = _CASED.replace("{end}", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}|" + _CASED_REST


@dataclass(frozen=True)
class Pre:
    """One pre-tokenizer of llama.cpp."""

    id: str
    """Value of `tokenizer.ggml.pre`."""
    steps: tuple[str, ...]
    """Regular expressions that a text is split by, one after the other; `digits` splits digits one by one, `gpt2` is
    the expression that a ByteLevel pre-tokenizer has built in."""
    ignores_merges: bool = False
    """Whether llama.cpp takes a word that is a token as it stands, without its merges."""


KNOWN = (
    Pre("gpt-2", ("gpt2",)),
    Pre("smollm", ("digits", "gpt2")),
    Pre("llama-bpe", (LLAMA3,), ignores_merges=True),
    Pre("smaug-bpe", (LLAMA3,)),
    Pre("qwen2", (QWEN2,)),
    Pre("qwen35", (QWEN35,)),
    Pre("tekken", (TEKKEN,), ignores_merges=True),
    Pre("gpt-4o", (O200K,)),
    Pre("deepseek-v3", (r"\p{N}{1,3}", _KANA, _DEEPSEEK)),
)
"""As in llama.cpp's `src/llama-vocab.cpp` (`llm_tokenizer_bpe`): the expressions of `tokenizer.json` that each id
stands for. Ids with the same splitting as one of these are not listed a second time. It only comes near to those of
`tekken`, `gpt-4o` and `deepseek-v3`: combining marks, case outside ASCII, and `~` may be split in other places."""


def pre_tokenizer(backend: dict[str, Any]) -> str:
    """The id under which llama.cpp splits text as this tokenizer does.

    :param backend: a byte-level BPE tokenizer, as `tokenizer.json` has it.
    :raises Refused: llama.cpp has none; another one's ids would be wrong without a word.
    """
    model = backend["model"]
    steps, ignores = _steps(backend.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    if not model["merges"] and not ignores and set(steps) <= {step for pre in KNOWN for step in pre.steps}:
        return "gpt-2"  # every byte is a token of its own, however the text is split before
    same = [pre for pre in KNOWN if pre.steps == steps]
    exact = [pre for pre in same if pre.ignores_merges == ignores]
    if exact:
        return exact[0].id
    if same and _merges_reach_every_token(backend):
        return same[0].id  # then it makes no difference whether merges are ignored
    raise Refused(
        Problem(
            "export.gguf",
            f"llama.cpp has no pre-tokenizer that splits text as this tokenizer does ({_described(steps)})",
            "export with +export=[safetensors]",
        )
    )


def _steps(part: dict[str, Any] | None) -> tuple[str, ...]:
    """What splits a text, in order."""
    steps: list[str] = []
    for piece in parts_of(part, "pretokenizers"):
        kind = piece["type"]
        if kind == "ByteLevel" and not piece["add_prefix_space"]:
            steps += ["gpt2"] if piece.get("use_regex", True) else []
        elif kind == "Digits" and piece["individual_digits"]:
            steps.append("digits")
        elif kind == "Split" and _isolates(piece) and "Regex" in piece["pattern"]:
            # A line break stands in an expression as itself or escaped.
            steps.append(piece["pattern"]["Regex"].replace("\r", r"\r").replace("\n", r"\n"))
        else:
            steps.append(json.dumps(piece, ensure_ascii=False))
    return tuple(steps)


def parts_of(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, in order.

    :param name: under which a sequence holds its parts: `normalizers` or `pretokenizers`.
    """
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [piece for inner in part[name] for piece in parts_of(inner, name)]
    return [part]


def _isolates(split: dict[str, Any]) -> bool:
    """Whether the parts that match are words of their own, and so is what stands between them.

    `Removed` and inverted keeps only what matches: the same, as each expression of `KNOWN` that comes so matches all.
    """
    return (split["behavior"], split["invert"]) in (("Isolated", False), ("Removed", True))


def _merges_reach_every_token(backend: dict[str, Any]) -> bool:
    """Whether the merges make each token of the vocabulary out of its characters."""
    from tokenizers import Tokenizer

    model = {**backend["model"], "ignore_merges": False}
    parts = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"))
    bare = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model}))
    added = {token["content"] for token in backend["added_tokens"]}
    words = [word for word in model["vocab"] if word not in added]
    return all(len(found.ids) == 1 for found in bare.encode_batch(words, add_special_tokens=False))


def _described(steps: tuple[str, ...]) -> str:
    text = " then ".join(steps) or "no splitting at all"
    return text if len(text) <= 160 else f"{text[:157]}..."
