"""Which prompts are completed when: in the order given, each in a row of the batch as soon as one is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FEW = 8
"""Free rows are filled once they are this part of the batch: each filling holds up the others."""


@dataclass(frozen=True)
class Request:
    """A completion that is wanted."""

    index: int
    prompt: tuple[int, ...]
    limit: int
    """Tokens at most."""
    seed: int


class Queue:
    """Requests that wait, and the rows of the batch that are free or taken."""

    def __init__(self, requests: Sequence[Request], rows: int) -> None:
        self._waiting = deque(requests)
        self._free = list(range(rows))[::-1]
        self.running: dict[int, Request] = {}
        """By row."""
        self._rows = rows

    def __bool__(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._waiting or self.running)

    def admitted(self) -> list[tuple[int, Request]]:
        """Requests that begin now, each with its row."""
        worth = min(len(self._waiting), max(1, self._rows // FEW))
        if not worth or (len(self._free) < worth and self.running):
            return []
        number = min(len(self._free), len(self._waiting))
        begun = [(self._free.pop(), self._waiting.popleft()) for _ in range(number)]
        self.running.update(begun)
        return begun

    def finish(self, row: int) -> Request:
        """Free a row."""
        self._free.append(row)
        return self.running.pop(row)


def by_prompt(begun: Sequence[tuple[int, Request]], tokens: int) -> Iterator[list[list[tuple[int, Request]]]]:
    """Passes of at most so many tokens, or one prompt; in each, the requests of every prompt."""
    groups: dict[tuple[int, ...], list[tuple[int, Request]]] = {}
    for row, request in begun:
        groups.setdefault(request.prompt, []).append((row, request))
    batch: list[list[tuple[int, Request]]] = []
    size = 0
    for prompt, group in groups.items():
        if batch and size + len(prompt) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += len(prompt)
    if batch:
        yield batch
