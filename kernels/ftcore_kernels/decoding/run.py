"""One call: prompts in packed passes, then a token a step for all rows at once, and finished rows replaced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ftcore import Sampling
from ftcore.guards.finite import NonFinite
from ftcore.guards.shortage import is_out_of_memory
from ftcore_kernels.decoding import convolution, layers
from ftcore_kernels.decoding.attention import Prompts, Step
from ftcore_kernels.decoding.batch import Batch
from ftcore_kernels.decoding.kept import Kept
from ftcore_kernels.decoding.layers import Layers
from ftcore_kernels.decoding.modules import Own
from ftcore_kernels.decoding.prompts import Packed, behind, masked
from ftcore_kernels.decoding.recording import recorded
from ftcore_kernels.decoding.requests import Queue, Request, by_prompt
from ftcore_kernels.decoding.sampling import Sampler
from ftcore_kernels.layers.uncovered import Uncovered
from ftcore_kernels.reference.decode_attention import Scores

if TYPE_CHECKING:
    from ftcore_kernels.decoding.engine import Engine

LOOK = 8
"""Steps between two looks at which rows have ended: each waits for the device."""


class Run:
    """Its cache, its batch and its queue."""

    def __init__(
        self,
        engine: Engine,
        computed: Layers | Own,
        requests: Sequence[Request],
        sampling: Sampling,
        ends: Sequence[int],
        kept: Kept | None = None,
    ) -> None:
        self._engine, self._layers, self._device = engine, computed, engine.device
        if empty := [request.index for request in requests if not request.prompt]:
            raise ValueError(f"prompt {empty[0]} has no tokens: give one at least, such as the one that begins a text")
        if (least := min(request.limit for request in requests)) < 1:
            raise ValueError(f"max_new_tokens is {least}: a completion has a token at least")
        longest = max(len(request.prompt) for request in requests) + max(request.limit for request in requests)
        reach = computed.longest
        if reach is not None and longest > reach:
            raise Uncovered(f"rows may have {longest} tokens, and from {reach} on attention asks where a token stands")
        if engine.other_angles is not None and longest > engine.other_angles:
            raise Uncovered(
                f"rows may have {longest} tokens, and beyond {engine.other_angles} LongRoPE turns all of them otherwise"
            )
        self._prompt_tokens = engine.prompt_tokens if reach is None else min(engine.prompt_tokens, reach)
        new = max(request.limit for request in requests)
        made = partial(engine.cache, longest, len(requests))
        self._cache, self._known = (made(), 0) if kept is None else kept.resumed(requests[0].prompt, longest, made)
        self._queue = Queue(requests, self._cache.rows)
        self._sample = Sampler(sampling, layers.op("draw", self._device))
        seen = engine.vocabulary if sampling.repetition_penalty != 1 else 0
        self._batch = Batch.empty(self._cache.rows, new, list(ends), self._device, seen)
        self._attend = layers.op("decode_attention", self._device)
        self._mask = engine.no_mask(self._cache.rows)
        if self._known:  # a step that is recorded writes, and nothing that is kept
            self._batch.positions.fill_(self._known)

    def results(self) -> Iterable[tuple[int, list[int], list[float]]]:
        """Index, tokens and log-probabilities of each request, as they are done."""
        for _ in self.looks():
            yield from self.ended()

    def looks(self) -> Iterator[None]:
        """A stop wherever rows may have ended; `ended` is to be asked there."""
        step = self._step
        if self._engine.may_record and self._batch.ids.shape[1] > LOOK:
            step = self._recorded()  # before the first row begins: nobody is alive, and nothing is written
        while self._queue:
            for group in by_prompt(self._queue.admitted(), self._prompt_tokens):
                self._begin(group)
            yield
            if self._queue.running:
                for _ in range(LOOK if self._device.type == "cuda" else 1):
                    step()
                yield

    def written(self, after: int) -> list[int]:
        """What the first row has written, without its first `after` tokens."""
        written = slice(after, int(self._batch.counts[0]))
        refuse_overflow(self._batch.logprobs[0, written].tolist())
        found: list[int] = self._batch.ids[0, written].tolist()
        return found

    def _recorded(self) -> Callable[[], None]:
        """The step as a graph; as it is, where something in the model asks the host after all."""
        try:
            return recorded(self._step)
        except RuntimeError as error:
            torch.cuda.synchronize()
            if is_out_of_memory(error):  # fewer rows at a time may be recorded
                raise
            self._engine.may_record = False
            print(f"generator: steps are launched one by one, because they cannot be recorded: {error}".splitlines()[0])
            return self._step

    def _begin(self, groups: list[list[tuple[int, Request]]]) -> None:
        """Read prompts, and draw the first token of each of their requests."""
        device = self._device
        lengths = [len(group[0][1].prompt) for group in groups]
        logits, ahead = self._read(groups, lengths)

        members = [(at, row, request) for at, group in enumerate(groups) for row, request in group]
        of = torch.tensor([at for at, *_ in members], device=device)
        own = torch.tensor([row for _, row, _ in members], device=device)
        copies = [(groups[at][0][0], row) for at, row, _ in members if row != groups[at][0][0]]
        if copies:
            sources, targets = torch.tensor(copies, device=device).T
            self._cache.copy(sources, targets, max(lengths))
        if self._batch.seen is not None:
            self._batch.seen[own] = False
            for _, row, request in members:
                known = [token for token in request.prompt if token < self._batch.seen.shape[1]]  # images have others
                self._batch.seen[row, torch.tensor(known, dtype=torch.int64, device=device)] = True
        seeds = torch.tensor([request.seed for *_, request in members], device=device)
        seen = None if self._batch.seen is None else self._batch.seen[own]
        tokens, logprobs = self._sample(logits[of], seeds, torch.zeros_like(seeds), seen)
        self._batch.admit(
            own, torch.tensor(lengths, device=device)[of],
            torch.tensor([request.limit for *_, request in members], device=device), seeds, tokens, logprobs,
            ahead[of],
        )  # fmt: skip

    def _read(self, groups: list[list[tuple[int, Request]]], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts in one pass, into the row of the first request of each; of one that is known in part, the rest.

        Returns the logits behind each, `[G, V]`, and how far positions are ahead of tokens there, int64 `[G]`.
        """
        device, known = self._device, self._known
        new = [length - known for length in lengths]
        packed = Packed(new, device)
        ids = torch.tensor([[token for group in groups for token in group[0][1].prompt[known:]]], device=device)
        places = torch.cat([torch.arange(known, length) for length in lengths]).to(device)
        rows = torch.tensor([group[0][0] for group in groups]).repeat_interleave(torch.tensor(new)).to(device)
        media = groups[0][0][1].media

        def attention(index: int, scores: Scores, mask: Any) -> Prompts:
            if known:
                inner = partial(self._behind, index, scores, lengths[0])
            elif media is None:
                inner = partial(packed.attend, scores=scores)
            else:
                inner = partial(masked, scores=scores, mask=mask)
            return Prompts(inner, self._cache, index, rows, places)

        def mix(index: int, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
            return convolution.packed(x, filters, self._cache.tails[index], rows, places)

        with self._layers.computing(attention, mix, with_mask=media is not None):
            if media is not None:
                logits, ahead = self._engine.shown(ids, media)
                return logits[0], ahead
            last = torch.tensor(new).cumsum(0).to(device) - 1
            mask = self._engine.no_mask(1)
            logits = self._engine.logits(ids, places[None], attention_mask=mask, logits_to_keep=last)[0]
            return logits, torch.zeros_like(last)

    def _behind(
        self, layer: int, scores: Scores, length: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        """As a pass's attention: of the last tokens of the one prompt, whose keys are all in the cache by now."""
        return behind(q, *self._cache.first(layer, 0, length), scores)

    def _step(self) -> None:
        """The next token of every row."""
        batch = self._batch

        def attention(index: int, scores: Scores, mask: Any) -> Step:
            return Step(self._attend, self._cache, index, batch.positions, scores)

        def mix(index: int, x: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
            return convolution.stepped(x, filters, self._cache.tails[index])

        with self._layers.computing(attention, mix):
            positions = (batch.positions + batch.ahead)[:, None]
            logits = self._engine.logits(batch.tokens[:, None], positions, attention_mask=self._mask)[:, -1]
        batch.append(*self._sample(logits, batch.seeds, batch.counts, batch.seen))

    def ended(self) -> list[tuple[int, list[int], list[float]]]:
        """What is done; its rows are free."""
        alive, counts = torch.stack((self._batch.alive.long(), self._batch.counts)).tolist()
        rows = [row for row in self._queue.running if not alive[row]]
        if not rows:
            return []
        at = torch.tensor(rows, device=self._device)
        ids, logprobs = self._batch.ids[at].tolist(), self._batch.logprobs[at].tolist()
        for place, row in enumerate(rows):
            refuse_overflow(logprobs[place][: counts[row]])
        return [
            (self._queue.finish(row).index, ids[place][: counts[row]], logprobs[place][: counts[row]])
            for place, row in enumerate(rows)
        ]


def refuse_overflow(logprobs: Sequence[float]) -> None:
    """Raises NonFinite for tokens that were drawn from no distribution: from logits that are not finite."""
    if not all(map(math.isfinite, logprobs)):
        raise NonFinite(
            "the model's numbers overflow: what it says next is not finite\n"
            "    fix: set model.dtype=bfloat16, or float32 on a GPU without it; or look at its weights"
        )
