"""Where the documents of a batch begin: what varlen kernels take in place of a mask."""

from __future__ import annotations

from typing import NamedTuple

import torch

FEWEST = 16
SHORTEST = 128


class Documents(NamedTuple):
    """Documents one behind the other in the flattened tokens of a batch; none reaches over the end of a row.

    Both numbers are rounded up to powers of two, so that batches of a shape differ in few ways and their launches can
    be recorded: what is missing is filled up with documents of no tokens.
    """

    offsets: torch.Tensor
    """Int32 `[N + 1]`: where each begins, and the number of all tokens at the end."""
    longest: int
    """No document has more tokens."""
    real: torch.Tensor | None = None
    """Bool `[B, S]`, False for pads on the left: they see nothing, and their output is zero as it is SDPA's."""

    @property
    def bucket(self) -> tuple[int, int, bool]:
        """What a recorded launch depends on."""
        return self.offsets.shape[0], self.longest, self.real is not None

    @property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """What is another for every batch."""
        return (self.offsets,) if self.real is None else (self.offsets, self.real)

    def on(self, device: torch.device) -> Documents:
        """The same on a layer's device."""
        real = None if self.real is None else self.real.to(device)
        return Documents(self.offsets.to(device), self.longest, real)

    @classmethod
    def beginning(cls, first: torch.Tensor, device: torch.device | str, real: torch.Tensor | None = None) -> Documents:
        """From a bool tensor `[B, S]` on the host: whether a token is the first of its document."""
        first = first.clone()
        first[:, 0] = True
        starts = first.flatten().nonzero().flatten()
        total = first.numel()
        lengths = torch.diff(starts, append=starts.new_tensor([total]))
        offsets = torch.full((_rounded(len(starts), FEWEST) + 1,), total, dtype=torch.int32)
        offsets[: len(starts)] = starts
        if torch.device(device).type == "cuda":  # from pinned memory nobody waits for the copy
            offsets = offsets.pin_memory().to(device, non_blocking=True)
        return cls(offsets.to(device), _rounded(int(lengths.max()), SHORTEST), real)


def _rounded(number: int, least: int) -> int:
    """The power of two at or above a number, and no less than `least`."""
    return max(least, 1 << (number - 1).bit_length())
