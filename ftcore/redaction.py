"""Access tokens and passwords are never written: known by their form, or by the variables that hold them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TextIO

HIDDEN = "[secret]"
"""What is written in their place."""
FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"  # Hugging Face
    # OpenAI and those who followed it. `sk` is Slovak too: a file may be named `sk-wikipedia-2024-cleaned`.
    r"|sk-(?:(?:proj|svcacct|admin|ant)-[A-Za-z0-9_-]{20,}"
    r"|(?=[A-Za-z0-9_-]*\d)(?:(?:[a-z0-9]{1,8}-){0,3}[A-Za-z0-9]{20,}"
    r"|(?=[A-Za-z0-9_-]*[a-z0-9][A-Z])[A-Za-z0-9_-]{20,})[A-Za-z0-9_-]*)"
    r"|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{20,}"
    r"|wandb_v1_[A-Za-z0-9_-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # AWS
    r"|xox[abprs]-[A-Za-z0-9-]{10,}"  # Slack
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r")"
    r"|(?<=://)[^\s/:@'\"]*:[^\s/@'\"]+(?=@)"  # user:password@ of an address
)
NAMES = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
"""How the names of environment variables with secrets end."""
SHORTEST = 12
"""Characters; what is shorter (`true`, `training`) is a word more often than a secret, and stands in many texts."""
KEYS = re.compile(
    r"(?:.*\.)?(?:(?:\w+_)?(?:api_?key|secret(?:_key)?|password|passwd|credentials)"
    r"|(?:(?:hf|hub|push_to_hub|access|auth|use_auth|bearer|api|session|wandb|github)_)?token)"
)
"""Keys of a config whose text is a secret; `use_cls_token`, `eos_token` and `new_tokens` are none."""


def secrets(environ: Mapping[str, str] | None = None) -> list[str]:
    """Values of the environment that are secret by their variable's name, longest first."""
    given = os.environ if environ is None else environ
    return _longest_first(tuple(v for name, v in given.items() if NAMES.search(name) and len(v) >= SHORTEST))


@lru_cache(maxsize=8)
def _longest_first(values: tuple[str, ...]) -> list[str]:
    # The path of a key file is none, and stands in many texts.
    return sorted({value for value in values if not os.path.exists(value)}, key=len, reverse=True)


def redact(text: str) -> str:
    """The text without secrets."""
    for value in secrets():
        text = text.replace(value, HIDDEN)
    return FORMS.sub(HIDDEN, text)


def redacted(value: Any) -> Any:
    """The same for each text in lists and mappings."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redacted(key): redacted(item) for key, item in value.items()}
    return [redacted(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_secret(key: str, value: Any) -> bool:
    """Whether a setting holds a secret: by its form, by its key, or because the environment holds the same."""
    if not isinstance(value, str) or value.lower() in ("", "null", "none", "true", "false"):
        return False
    return bool(FORMS.search(value) or KEYS.fullmatch(key)) or any(known in value for known in secrets())


def without_secrets(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a program that needs no token."""
    given = os.environ if environ is None else environ
    return {name: value for name, value in given.items() if not NAMES.search(name) and not FORMS.search(value)}


class Redacted:
    """A text stream that writes no secrets; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, secrets hidden; the count is the given text's, as its writer expects."""
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line, secrets hidden."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """From now on this process prints no secret, in messages, logs and tracebacks. For a command, not for a library."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Redacted):
            setattr(sys, name, Redacted(stream))
