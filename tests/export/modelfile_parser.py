"""A Modelfile read as Ollama reads it (`parser/parser.go`), strictly, for the tests."""

from __future__ import annotations

import re

INSTRUCTIONS = {"from", "parameter", "template", "system", "adapter", "license", "message", "requires"}


def parse(text: str) -> list[tuple[str, str]]:
    """Instructions in order: `from`, `template`, ... or a parameter's name, and its value. Raises ValueError."""
    found: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        if text[place] in " \t\r\n":
            place += 1
        elif text[place] == "#":
            place = _line_end(text, place)
        else:
            name, place = _name(text, place)
            value, place = _value(text, place)
            found.append((name, value))
    if not any(name == "from" for name, _ in found):
        raise ValueError("no FROM line")
    return found


def _line_end(text: str, place: int) -> int:
    breaks = [at for at in (text.find("\n", place), text.find("\r", place)) if at >= 0]
    return min(breaks, default=len(text))


def _name(text: str, place: int) -> tuple[str, int]:
    match = re.compile(r"([A-Za-z]+)[ \t]").match(text, place)
    if match is None or match[1].lower() not in INSTRUCTIONS:
        raise ValueError(f"no instruction: {text[place : place + 20]!r}")
    if match[1].lower() != "parameter":
        return match[1].lower(), match.end()
    parameter = re.compile(r"([A-Za-z0-9_]+)[ \t]").match(text, match.end())
    if parameter is None:
        raise ValueError(f"no parameter: {text[place : place + 30]!r}")
    return parameter[1], parameter.end()


def _value(text: str, place: int) -> tuple[str, int]:
    """A value goes on over line breaks until its quotation marks are closed; unprintable characters are dropped."""
    taken = ""
    for at in range(place, len(text) + 1):
        end = at == len(text)
        if end or text[at] in "\r\n":
            value = _unquoted(taken.strip())
            if value is not None:
                return value, at
            if end:
                raise ValueError("the last value is not closed")
        if text[at].isprintable() or text[at] in "\r\n\t":
            taken += text[at]
    raise AssertionError


def _unquoted(taken: str) -> str | None:
    for marks in ('"""', '"'):
        if taken.startswith(marks):
            closed = len(taken) >= 2 * len(marks) and taken.endswith(marks)
            return taken[len(marks) : -len(marks)] if closed else None
    return taken
