"""Writes completions: prompts in packed passes, then a token a step for all rows at once, finished rows replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ftcore import Completions, Role, Sampling
from ftcore_kernels.decoding import layers
from ftcore_kernels.decoding.attention import Prompts, Step
from ftcore_kernels.decoding.batch import Batch
from ftcore_kernels.decoding.cache import Cache, row_bytes
from ftcore_kernels.decoding.layers import Place
from ftcore_kernels.decoding.recording import recordable, recorded
from ftcore_kernels.decoding.requests import Queue, Request, by_prompt
from ftcore_kernels.decoding.sampling import Sampler
from ftcore_kernels.layers.decoder.attention import choose, handed, taken
from ftcore_kernels.layers.uncovered import Uncovered

OWN = ("attention_mask", "position_embeddings")
"""Arguments of a decoder layer that are not its attention function's."""
UNPACKED = 0.5
"""Part of the memory that 4-bit weights may fill unpacked; the cache has the rest."""
LOOK = 8
"""Steps between two looks at which rows have ended: each waits for the device."""


@dataclass(frozen=True)
class Limits:
    """What an engine may take."""

    rows: int
    """Completions at a time."""
    prompt_tokens: int
    """Of one pass over prompts; a longer prompt has a pass of its own."""
    memory: Callable[[], int] | None = None
    """Bytes that cache and unpacked weights may take now; None leaves it to `rows`."""


class Engine:
    """Completions by a `...ForCausalLM`, in evaluation mode, with or without PEFT's layers in it."""

    def __init__(self, base: Any, role: Role, limits: Limits) -> None:
        self._base, self._role, self._limits = base, role, limits
        self._device: torch.device = base.device
        self._places: list[Place] = []
        self._dtype = base.get_input_embeddings().weight.dtype

    def open(self) -> None:
        """Take the weights as they are now. Raises Uncovered if layers or an adapter are not computed here."""
        if not self._places:
            places = layers.read(self._base, self._role, self._device)
            room = 0 if self._limits.memory is None else int(UNPACKED * self._limits.memory())
            with torch.no_grad():
                layers.prepare(places, self._dtype, room)
            self._places = places

    def close(self) -> None:
        """Give everything back."""
        self._places = []

    @torch.no_grad()
    def run(self, requests: Sequence[Request], sampling: Sampling, ends: Sequence[int]) -> Completions:
        """The completions of all requests, in the order of their index."""
        self.open()
        written: list[tuple[list[int], list[float]]] = [([], [])] * len(requests)
        if requests:
            for index, ids, logprobs in _Run(self, self._places, requests, sampling, ends).results():
                written[index] = ids, logprobs
        return Completions(ids=[ids for ids, _ in written], logprobs=[logprobs for _, logprobs in written])

    def cache(self, length: int, wanted: int) -> Cache:
        """For as many rows as are wanted and have room; one at least."""
        shapes = [place.shape for place in self._places]
        rows = min(self._limits.rows, wanted)
        if self._limits.memory is not None:
            rows = max(1, min(rows, self._limits.memory() // row_bytes(shapes, length, self._dtype)))
        return Cache(shapes, rows, length, self._dtype, self._device)

    def logits(self, ids: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        """`[B, S, V]` by the class's own forward: what somebody bound to the instance is for training."""
        out = type(self._base).forward(
            self._base, input_ids=ids, position_ids=positions, use_cache=False, return_dict=True, **options
        )
        found: torch.Tensor = out.logits
        return found

    def described(self, ids: torch.Tensor, positions: torch.Tensor, begins: Any) -> dict[str, Any]:
        """A packed pass's inputs, with its mask if that can be said in advance."""
        inputs = {"input_ids": ids, "position_ids": positions}
        return {k: v for k, v in handed(self._base.base_model, inputs, begins).items() if k not in inputs}

    @property
    def vocabulary(self) -> int:
        """Columns of the logits."""
        return int(self._base.config.get_text_config().vocab_size)

    @property
    def may_record(self) -> bool:
        """Whether a step may be a CUDA graph."""
        return recordable(self._base.config, self._device)

    @property
    def prompt_tokens(self) -> int:
        """Of one pass over prompts."""
        return self._limits.prompt_tokens

    @property
    def device(self) -> torch.device:
        """Where it all happens."""
        return self._device


class _Run:
    """One call: its cache, its batch and its queue."""

    def __init__(
        self, engine: Engine, places: list[Place], requests: Sequence[Request], sampling: Sampling, ends: Sequence[int]
    ) -> None:
        self._engine, self._places, self._device = engine, places, engine.device
        self._longest = max(len(request.prompt) for request in requests)
        new = max(request.limit for request in requests)
        self._cache = engine.cache(self._longest + new, len(requests))
        self._queue = Queue(requests, self._cache.rows)
        self._sample = Sampler(sampling, layers.op("draw", self._device))
        seen = engine.vocabulary if sampling.repetition_penalty != 1 else 0
        self._batch = Batch.empty(self._cache.rows, new, list(ends), self._device, seen)
        self._attend = layers.op("decode_attention", self._device)
        self._mask = torch.ones((self._cache.rows, 1, 1, 1), dtype=torch.bool, device=self._device)
        """Four dimensions: transformers hands it on, and asks nobody which tokens are packed."""

    def results(self) -> Iterable[tuple[int, list[int], list[float]]]:
        """Index, tokens and log-probabilities of each request, as they are done."""
        step = self._step
        if self._engine.may_record and self._batch.ids.shape[1] > LOOK:
            step = self._recorded()  # before the first row begins: nobody is alive, and nothing is written
        while self._queue:
            for group in by_prompt(self._queue.admitted(), self._engine.prompt_tokens):
                self._begin(group)
            yield from self._ended()
            if self._queue.running:
                for _ in range(LOOK if self._device.type == "cuda" else 1):
                    step()
                yield from self._ended()

    def _recorded(self) -> Callable[[], None]:
        """The step as a graph; as it is, where something in the model asks the host after all."""
        try:
            return recorded(self._step)
        except RuntimeError as error:
            torch.cuda.synchronize()
            print(f"generator: steps are launched one by one, because they cannot be recorded: {error}".splitlines()[0])
            return self._step

    def _begin(self, groups: list[list[tuple[int, Request]]]) -> None:
        """Read prompts, and draw the first token of each of their requests."""
        device = self._device
        lengths = [len(group[0][1].prompt) for group in groups]
        ids = torch.tensor([[token for group in groups for token in group[0][1].prompt]], device=device)
        places = torch.cat([torch.arange(length) for length in lengths])
        begins = (places == 0).numpy()[None]
        places = places.to(device)
        rows = torch.tensor([group[0][0] for group in groups])
        per_token = rows.repeat_interleave(torch.tensor(lengths)).to(device)
        last = torch.tensor(lengths).cumsum(0).to(device) - 1

        def attention(place: Place, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Prompts:
            attention, mask = place.module.self_attn, taken(kwargs.get("attention_mask"))
            options = {name: value for name, value in kwargs.items() if name not in OWN}
            options |= place.structure.window(attention)
            inner = choose(attention, hidden, mask, place.window, place.structure.softcap(attention), options)
            return Prompts(inner, self._cache, place.index, per_token, places)

        with layers.computing(self._places, attention):
            options = self._engine.described(ids, places[None], begins)
            logits = self._engine.logits(ids, places[None], logits_to_keep=last, **options)[0]

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
                self._batch.seen[row, torch.tensor(request.prompt, device=device)] = True
        seeds = torch.tensor([request.seed for *_, request in members], device=device)
        seen = None if self._batch.seen is None else self._batch.seen[own]
        tokens, logprobs = self._sample(logits[of], seeds, torch.zeros_like(seeds), seen)
        self._batch.admit(
            own, torch.tensor(lengths, device=device)[of],
            torch.tensor([request.limit for *_, request in members], device=device), seeds, tokens, logprobs,
        )  # fmt: skip

    def _step(self) -> None:
        """The next token of every row."""
        batch = self._batch

        def attention(place: Place, hidden: torch.Tensor, kwargs: dict[str, Any]) -> Step:
            return Step(self._attend, self._cache, place.index, batch.positions, place.scores)

        with layers.computing(self._places, attention):
            positions = batch.positions[:, None]
            logits = self._engine.logits(batch.tokens[:, None], positions, attention_mask=self._mask)[:, -1]
        batch.append(*self._sample(logits, batch.seeds, batch.counts, batch.seen))

    def _ended(self) -> list[tuple[int, list[int], list[float]]]:
        """What is done; its rows are free."""
        alive, counts = torch.stack((self._batch.alive.long(), self._batch.counts)).tolist()
        rows = [row for row in self._queue.running if not alive[row]]
        if not rows:
            return []
        at = torch.tensor(rows, device=self._device)
        ids, logprobs = self._batch.ids[at].tolist(), self._batch.logprobs[at].tolist()
        return [
            (self._queue.finish(row).index, ids[place][: counts[row]], logprobs[place][: counts[row]])
            for place, row in enumerate(rows)
        ]


def fitting(base: Any, roles: Sequence[Role], limits: Limits) -> Engine:
    """An engine over the model. Raises Uncovered if the family is of another kind; `open` looks at the layers."""
    role = next((role for role in roles if role.name == "decoder_layer"), None)
    if role is None:
        raise Uncovered("the family declares no decoder layer of the plain kind")
    return Engine(base, role, limits)
