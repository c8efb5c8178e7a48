"""As much of Go's text/template as ftcore's Ollama templates use, written for the tests alone.

Checked against the real engine by `test_go_itself_agrees`, where Go is installed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\$\w*(?:\.\w+)*|\.\w+|[()]|\w+')
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda *values: next((v for v in values if not v), values[-1]),
    "or": lambda *values: next((v for v in values if v), values[-1]),
    "not": lambda a: not a,
    "len": len,
    "slice": lambda values, start: values[start:],
    "print": lambda *words: "".join(words),
    "true": lambda: True,
}


def run(template: str, **values: Any) -> str:
    """What the template writes. Raises ValueError for what Go would not parse."""
    parts: list[tuple[bool, str]] = []
    for number, piece in enumerate(re.split(r"\{\{((?:\"(?:[^\"\\]|\\.)*\"|[^}\"])*)\}\}", template)):
        parts.append((number % 2 == 1, piece))
    for number, (action, piece) in enumerate(parts):
        if action and piece.startswith("- "):
            parts[number - 1] = (False, parts[number - 1][1].rstrip(" \t\r\n"))
            parts[number] = (True, piece[1:])
    machine = _Machine(parts, values)
    out = machine.block(values, True)
    if machine.at != len(parts):
        raise ValueError("an end without a beginning")
    return out


class _Machine:
    def __init__(self, parts: Sequence[tuple[bool, str]], values: Mapping[str, Any]) -> None:
        self.parts, self.at, self.variables = parts, 0, {"$": values}

    def block(self, dot: Any, live: bool) -> str:
        """Up to the `else` or `end` that closes the block, which is not taken."""
        out = ""
        while self.at < len(self.parts):
            action, piece = self.parts[self.at]
            words = piece.split() if action else []
            if words[:1] in (["end"], ["else"]):
                return out
            self.at += 1
            if not action:
                out += piece if live else ""
            elif words[0] == "range":
                out += self._range(piece, dot, live)
            elif words[0] == "if":
                out += self._if(piece.strip().removeprefix("if"), dot, live)
            elif assigned := re.fullmatch(r"\s*(\$\w+) (:?=) (.*)", piece, re.DOTALL):
                if live:
                    self.variables[assigned[1]] = self.value(assigned[3], dot)
            elif live:
                out += str(self.value(piece, dot))
        return out

    def _range(self, piece: str, dot: Any, live: bool) -> str:
        index, item, over = re.fullmatch(r"\s*range (\$\w+), (\$\w+) := (.*?)\s*", piece).groups()  # type: ignore[union-attr]
        start, out = self.at, ""
        for number, element in enumerate(self.value(over, dot)) if live else ():
            self.at = start
            self.variables |= {index: number, item: element}
            out += self.block(element, True)
        if not out:
            self.at = start
            self.block(dot, False)
        self._end()
        return out

    def _if(self, condition: str, dot: Any, live: bool) -> str:
        taken = live and bool(self.value(condition, dot))
        out = self.block(dot, taken)
        while self.parts[self.at][1].split()[0] == "else":
            more = self.parts[self.at][1].strip().removeprefix("else").strip()
            self.at += 1
            now = live and not taken and (not more or bool(self.value(more.removeprefix("if"), dot)))
            out += self.block(dot, now)
            taken = taken or now
        self._end()
        return out

    def _end(self) -> None:
        if self.at >= len(self.parts) or self.parts[self.at][1].strip() != "end":
            raise ValueError("a block without an end")
        self.at += 1

    def value(self, text: str, dot: Any) -> Any:
        tokens = TOKEN.findall(text)
        if re.sub(r"\s", "", text) != re.sub(r"\s", "", "".join(tokens)):
            raise ValueError(f"{text!r} is not understood")
        value, rest = self._call(tokens, dot)
        if rest:
            raise ValueError(f"{rest} is left of {text!r}")
        return value

    def _call(self, tokens: list[str], dot: Any) -> tuple[Any, list[str]]:
        if tokens[0] not in FUNCTIONS:
            return self._operand(tokens, dot)
        name, rest, arguments = tokens[0], tokens[1:], []
        while rest and rest[0] != ")":
            argument, rest = self._operand(rest, dot)
            arguments.append(argument)
        return FUNCTIONS[name](*arguments), rest

    def _operand(self, tokens: list[str], dot: Any) -> tuple[Any, list[str]]:
        token, rest = tokens[0], tokens[1:]
        if token == "(":
            value, rest = self._call(rest, dot)
            if rest[:1] != [")"]:
                raise ValueError("a bracket is not closed")
            return value, rest[1:]
        if token.startswith('"'):
            return ast.literal_eval(token), rest
        if token.isdigit():
            return int(token), rest
        first, *fields = token.split(".")
        value = dot if first == "" else self.variables[first]
        for field in fields:
            value = value[field]
        return value, rest
