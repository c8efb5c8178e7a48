"""What the rendering of a chat template may cost: time, memory, length. Each step that could cost much is asked first.

Python cannot interrupt one call that fills the memory or takes hours, such as `'a' * 10**9`, so none that would is
begun. All values stay small: a list is as heavy as its text would be, so that what is built of it stays small as well.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import TemplateRuntimeError

TEMPLATE = 100_000
"""Characters of a template."""
TEXT = 10_000_000
"""Characters of what it renders, and of each value on the way."""
SECONDS = 2.0
"""Processor time that the rendering of one conversation may take."""
MEMORY = 256 << 20
"""Bytes by which one rendering may make the process grow."""
LOOK = MEMORY // 4
"""Characters made between two looks at the process's size."""
BITS = 100_000
"""Bits of a whole number."""
CONTAINERS: tuple[type[Any], ...] = (
    list,
    tuple,
    dict,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


class TooMuch(TemplateRuntimeError):
    """A template that goes beyond a limit; says which."""


def too_long() -> TooMuch:
    """The refusal of a value or a text that is too long."""
    return TooMuch(f"makes more than {TEXT // 10**6} MB of text")


def _size() -> int:
    """Bytes that the process has now. Its highest so far would hide all growth below what it once had."""
    import psutil

    return int(psutil.Process().memory_info().rss)


class _Meter(threading.local):
    """What the rendering in this thread has cost so far."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A new rendering begins."""
        # The system is asked for processor time and memory only once a rendering is slow or large: few are.
        self.ends, self.used, self.size = time.monotonic() + SECONDS / 8, -1.0, -1
        self.written = self.made = 0

    def tick(self, written: int = 0) -> bool:
        """One step of a template that writes so many characters; True, so that it can stand in a condition."""
        if written:
            self.write(written)
        if time.monotonic() > self.ends:
            self._late()
        return True

    def _late(self) -> None:
        if self.used < 0:
            self.used = time.thread_time() - SECONDS / 8
        elif time.thread_time() - self.used >= SECONDS:
            raise TooMuch(f"takes more than {SECONDS:g} s")
        self.ends = time.monotonic() + SECONDS / 8  # by the wall clock: others may have had the processor

    def write(self, count: int) -> None:
        """So many characters go into the text, or into a part that is put together first."""
        self.written += count
        self.make(count)
        if self.written > 2 * TEXT:
            raise too_long()

    def make(self, count: int) -> None:
        """So many characters of new values."""
        self.made += count
        if self.made > LOOK:
            self.made = 0
            now = _size()
            self.size = now if self.size < 0 else self.size
            if now - self.size > MEMORY - LOOK:
                raise TooMuch(f"takes more than {MEMORY >> 20} MB")


METER = _Meter()


def room_for(count: int) -> None:
    """Raises TooMuch where so many characters would be too long for one value."""
    if count > TEXT:
        raise too_long()


def weight(value: Any) -> int:
    """About how long the value is as text. Raises TooMuch rather than to count for long."""
    if isinstance(value, (str, bytes)):
        return len(value)
    total, left = 0, [value]
    while left:
        one = left.pop()
        if isinstance(one, (str, bytes)):
            total += len(one)
        elif isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())
        elif isinstance(one, CONTAINERS):
            left.extend(one)
        total += 4
        if total > TEXT or len(left) > TEXT // 4:
            raise too_long()
    return total


def checked(value: Any) -> Any:
    """The value, which a template has built: none that is too heavy."""
    if type(value) is not str and isinstance(value, CONTAINERS):
        METER.make(8 * len(value))
        weight(value)
        return value
    return counted(value)


def counted(value: Any) -> Any:
    """The value, which a call or a filter returned."""
    if isinstance(value, (str, bytes)):
        room_for(len(value))
        METER.make(len(value))
    elif isinstance(value, (list, tuple)):
        METER.make(8 * len(value))
    elif isinstance(value, int) and value.bit_length() > BITS:
        raise TooMuch(f"computes a number of more than {BITS} bits")
    return value


def listed(values: Iterator[Any]) -> list[Any]:
    """What an iterator gives, one step each."""
    found = []
    for value in values:
        METER.tick()
        found.append(value)
    return found


def operation(operator: str, left: Any, right: Any) -> None:
    """Raises TooMuch for an operation whose result, or whose time, would be too much."""
    METER.tick()
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > BITS:
            raise TooMuch(f"computes a number of more than {BITS} bits")
    elif operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(times, int) and hasattr(many, "__len__"):
                room_for(weight(many) * max(times, 0))
    elif operator == "%" and isinstance(left, (str, bytes)):
        spread(left, right)
    elif operator == "+" and isinstance(left, (str, bytes)) and isinstance(right, (str, bytes)):
        room_for(len(left) + len(right))


def spread(pattern: Any, *values: Any) -> None:
    """Raises TooMuch for a format whose fields could become too long."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else str(pattern)
    nested = "*" in text or re.search(r":[^{}]*\{", text)
    if re.search(r"\d{7}", text) or (nested and any(_large(v) for value in values for v in _each(value))):
        raise too_long()
    room_for(len(text) + (text.count("%") + text.count("{")) * sum(map(weight, values)))


def _each(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return [v for part in value.values() for v in _each(part)]
    return [v for part in value for v in _each(part)] if isinstance(value, (list, tuple)) else [value]


def _large(value: Any) -> bool:
    return (isinstance(value, int) and abs(value) >= 10**6) or (
        isinstance(value, str) and bool(re.search(r"\d{7}", value))
    )


def method(call: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """Raises TooMuch for a method of a text or a number that would make too much of it."""
    owner, name = getattr(call, "__self__", None), getattr(call, "__name__", "")
    if not isinstance(owner, (str, bytes, int)):
        return
    given = [*args, *named.values()]
    numbers = [value for value in given if isinstance(value, int)]
    if name in ("ljust", "rjust", "center", "zfill", "to_bytes"):
        room_for(max(numbers, default=0))
    elif isinstance(owner, int):
        return
    elif name == "expandtabs":
        room_for(len(owner) * (1 + max(numbers, default=8)))
    elif name == "replace" and len(given) > 1:
        replacing(owner, given[0], given[1])
    elif name == "join" and given:
        room_for(weight(given[0]) + len(owner) * len(given[0]) if hasattr(given[0], "__len__") else TEXT + 1)
    elif name == "translate":
        room_for(len(owner) * (1 + max((weight(value) for value in given), default=0)))
    elif name in ("split", "rsplit", "splitlines") and len(owner) > TEXT // 4:
        raise too_long()  # a list of single letters is sixty times as large


def replacing(text: Any, old: Any, new: Any) -> None:
    """Raises TooMuch for a replacement that would be too long."""
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        room_for(len(text) + text.count(old) * len(new))
    else:
        room_for((weight(text) + 1) * (weight(new) + 1))
