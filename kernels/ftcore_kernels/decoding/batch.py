"""The rows that are being completed, as tensors on the device: a step changes them there and asks nobody."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Batch:
    """B rows, of which some may be idle: those compute along, and nothing of them is kept."""

    tokens: torch.Tensor
    """Int64 `[B]`: the last of each, not in the cache yet."""
    positions: torch.Tensor
    """Int64 `[B]`: where that will be."""
    counts: torch.Tensor
    """Int64 `[B]`: tokens written."""
    limits: torch.Tensor
    """Int64 `[B]`: how many there may be."""
    alive: torch.Tensor
    """Bool `[B]`."""
    seeds: torch.Tensor
    """Int64 `[B]`."""
    ids: torch.Tensor
    """Int64 `[B, new]`."""
    logprobs: torch.Tensor
    """fp32 `[B, new]`."""
    ahead: torch.Tensor
    """Int64 `[B]`: how far positions, as RoPE takes them, are ahead of places in the cache."""
    ends: torch.Tensor
    """Int64 `[E]`: tokens that end a row."""
    seen: torch.Tensor | None = None
    """Bool `[B, V]`: tokens of the prompt and the completion, where they are penalised."""

    @classmethod
    def empty(cls, rows: int, new: int, ends: list[int], device: torch.device, seen: int = 0) -> Batch:
        """Idle rows; `seen` is the vocabulary's size where that is kept."""
        numbers = torch.zeros((6, rows), dtype=torch.int64, device=device)
        return cls(
            tokens=numbers[0],
            positions=numbers[1],
            counts=numbers[2],
            limits=numbers[3],
            alive=torch.zeros(rows, dtype=torch.bool, device=device),
            seeds=numbers[4],
            ids=torch.zeros((rows, new), dtype=torch.int64, device=device),
            logprobs=torch.zeros((rows, new), dtype=torch.float32, device=device),
            ahead=numbers[5],
            ends=torch.tensor(ends, dtype=torch.int64, device=device),
            seen=torch.zeros((rows, seen), dtype=torch.bool, device=device) if seen else None,
        )

    def admit(
        self,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        limits: torch.Tensor,
        seeds: torch.Tensor,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        ahead: torch.Tensor,
    ) -> None:
        """Begin rows, int64 `[N]`, whose prompts of these lengths are in the cache, with their first tokens."""
        self.ahead[rows] = ahead
        self.tokens[rows], self.positions[rows], self.limits[rows], self.seeds[rows] = tokens, lengths, limits, seeds
        self.counts[rows] = 1
        self.ids[rows, 0], self.logprobs[rows, 0] = tokens, logprobs
        self.alive[rows] = ~self._ended(tokens) & (limits > 1)
        if self.seen is not None:
            self.seen[rows, tokens] = True

    def append(self, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """The next token of every row that is alive, `[B]` each; written over the old one."""
        alive, column = self.alive, self.counts.clamp(max=self.ids.shape[1] - 1)[:, None]
        for kept, new in ((self.ids, tokens), (self.logprobs, logprobs)):
            kept.scatter_(1, column, torch.where(alive[:, None], new[:, None], kept.gather(1, column)))
        if self.seen is not None:
            # An idle row may mark what it likes: it is cleared before it begins again.
            self.seen.scatter_(1, tokens[:, None], True)
        self.counts += alive
        self.positions += alive
        self.tokens.copy_(torch.where(alive, tokens, self.tokens))
        alive &= ~self._ended(tokens) & (self.counts < self.limits)

    def _ended(self, tokens: torch.Tensor) -> torch.Tensor:
        return (tokens[:, None] == self.ends).any(1)
