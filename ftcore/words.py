"""The words of a config: what may be given as such, before Hydra reads any of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ftcore.config import KINDS
from ftcore.config_guard import check_words
from ftcore.errors import Problem, Refused
from ftcore.overrides import GROUPS, RUN_KEYS
from ftcore.redaction import redact

USAGE = 'give a list of words: ["+model=NAME", ...]'
_KEY = re.compile(r"\+{0,2}~?([a-z_]+)[\w.@/]*=")


def checked(words: Any, key: str = "config") -> list[str]:
    """The words as a list.

    Raises Refused for what is no list of texts, and for a secret or several overrides in one word.

    :param key: What they are called in messages.
    """
    if isinstance(words, str):
        first = words.split()[0] if words.split() else "+model=NAME"
        raise Refused(Problem(key, "is a string", f'give a list of overrides: ["{redact(first)}", ...]'))
    if isinstance(words, bytes | Mapping) or not isinstance(words, Sequence):
        raise Refused(Problem(key, f"takes a list of words, and this is a {type(words).__name__}", USAGE))
    for number, word in enumerate(words):
        if not isinstance(word, str):
            fix = "put its words into one list: [*words, ...]" if isinstance(word, list | tuple) else USAGE
            raise Refused(Problem(f"{key}[{number}]", f"takes a word, and this is a {type(word).__name__}", fix))
    check_words(words)
    for word in words:
        if several := _overrides(word):
            fix = "give each as a word of its own: " + ", ".join(f'"{redact(one)}"' for one in several)
            raise Refused(Problem(key, f"holds {len(several)} overrides in one word: {redact(word)}", fix))
    return list(words)


def _overrides(word: str) -> list[str]:
    """The overrides in a word that holds several; a value with quotes may hold anything."""
    parts = word.split()
    if len(parts) < 2 or "'" in word or '"' in word or not all(map(_closed, parts)):
        return []
    found = [_KEY.match(part) for part in parts]
    return parts if all(key and key[1] in (*KINDS, *RUN_KEYS, *GROUPS) for key in found) else []


def _closed(part: str) -> bool:
    return all(part.count(start) == part.count(end) for start, end in ("[]", "{}", "()"))
