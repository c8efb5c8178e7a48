"""Batches of held-out prompts that are read before their turn, so that one call of the generator completes many.

The batches themselves stay as they are, and so do their order, their losses and their metrics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from ftcore import Completions

Rows = list[dict[str, Any]]
Write = Callable[[Sequence[Sequence[int]]], Completions]

TIMES = 4
"""Prompts of one call, in those that the generator completes at once: rows that end early are replaced until near the
end, completions take tens of MB, and the watchdog, for which ten steps without a batch are a hang, sees one in time."""


class Ahead:
    """A loader's batches, and the completions of those that were written.

    :param batches: How many are read at a time.
    :param ids_of: Token ids of the prompts of a batch's rows.
    """

    def __init__(self, loader: Any, batches: int, ids_of: Callable[[Rows], list[list[int]]]) -> None:
        self._loader, self._batches, self._ids_of = loader, batches, ids_of
        self._read: list[Rows] = []
        self._written: deque[tuple[list[int], list[int], list[float] | None]] = deque()

    def __iter__(self) -> Iterator[Rows]:
        batches = iter(self._loader)
        while some := list(islice(batches, self._batches)):
            self._read += some
            yield from some

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def taken(self, prompt_ids: Sequence[Sequence[int]], write: Write) -> Completions | None:
        """The completions of the batch whose turn it is; None for other prompts, such as a talk that goes on."""
        if not self._written:
            self._fill(write)
        some = list(islice(self._written, len(prompt_ids)))
        if [prompt for prompt, *_ in some] != [list(ids) for ids in prompt_ids]:
            return None
        for _ in some:
            self._written.popleft()
        logprobs = [row for *_, row in some if row is not None]
        return Completions(ids=[ids for _, ids, _ in some], logprobs=logprobs or None)

    def _fill(self, write: Write) -> None:
        prompts = [ids for rows in self._read for ids in self._ids_of(rows)]
        self._read.clear()
        if prompts:
            said = write(prompts)
            self._written += zip(prompts, said.ids, said.logprobs or [None] * len(prompts), strict=True)
