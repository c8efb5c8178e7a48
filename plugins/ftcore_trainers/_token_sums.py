"""Metrics of the tokens between two lines of the log, summed where they are and read when they are logged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class TokenSums:
    """Sums of the batches since the last line. Those on a device stay there: adding one never waits for it."""

    entropy: torch.Tensor | float = 0.0
    top1: torch.Tensor | float = 0.0
    supervised: int = 0
    read: torch.Tensor | int = 0
    """Tokens without padding."""
    batches: int = 0

    def add(self, output: Any, read: torch.Tensor | int) -> None:
        """Count a batch: the answer to `fused_loss=True`, and the number of its tokens without padding."""
        self.entropy = self.entropy + output.entropy_sum
        self.top1 = self.top1 + output.top1_sum
        self.supervised += output.tokens
        self.read = self.read + read
        self.batches += 1

    def over_processes(self, accelerator: Any) -> TokenSums:
        """The sums of all processes, as plain numbers. Waits for the device."""
        import torch

        values = [float(x) for x in (self.entropy, self.top1, self.supervised, self.read, self.batches)]
        if accelerator.num_processes > 1:
            mine = torch.tensor(values, dtype=torch.float64, device=accelerator.device)
            values = accelerator.reduce(mine, reduction="sum").tolist()
        entropy, top1, *counts = values
        return TokenSums(entropy, top1, *map(int, counts))
