"""Which prompts are completed when: in the order given, each in a row of the batch as soon as one is free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    media: Mapping[str, Any] | None = None
    """What the model takes besides the prompt's tokens: images, as its processor made them."""


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
    """Passes of at most so many tokens, or one prompt; in each, the requests of every prompt. Images are alone."""
    groups: dict[tuple[tuple[int, ...], int | None], list[tuple[int, Request]]] = {}
    for row, request in begun:
        images = None if request.media is None else id(request.media)
        groups.setdefault((request.prompt, images), []).append((row, request))
    batch: list[list[tuple[int, Request]]] = []
    size = 0
    for (prompt, images), group in groups.items():
        if images is not None:
            yield [group]
            continue
        if batch and size + len(prompt) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(group)
        size += len(prompt)
    if batch:
        yield batch
