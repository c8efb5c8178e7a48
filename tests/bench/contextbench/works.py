"""What is asked for: lengths that Unsloth publishes, and one side's step."""

from __future__ import annotations

from dataclasses import dataclass

from stepbench.works import Work

UNSLOTH = {8: 2972, 12: 21848, 16: 40724, 24: 78475, 40: 153977, 48: 191728, 80: 342733}
"""GiB of a card to the tokens of the longest row that Unsloth publishes for it: Llama-3.1-8B, QLoRA of rank 32."""
TIMES = 2
"""How much longer ftcore's must be."""
SPEED, SPEED_GIB = 6300, 12
"""Tokens a second at 65,536, and the memory that they may take."""

TINY = {"shape": "tiny", "tokens": 96, "scale": 100}
"""What `--tiny` sets."""


@dataclass(frozen=True)
class ContextWork(Work):
    """Steps over one row of `length` tokens."""

    depth: int = 0
    """Layers that are run; 0: all. The others' weights, gradients and moments take their memory all the same."""
    layers: int = 0
    """Layers of the whole model."""
    gib: float = 0.0
    """Memory that the process may take of the GPU; 0: all there is."""
    short: int = 0
    """Tokens of the warm-up's rows; 0: as many as the others'."""

    def title(self) -> str:
        """The work in a line."""
        weights = self.dtype if self.quantizer == "none" else self.quantizer
        return f"{self.shape}, LoRA r{self.rank}, {weights}, one row, memory={self.memory}, kernels={self.kernels}"


def wanted(side: str, gib: float, scale: int) -> int:
    """Tokens that a side must reach on a card of that size: Unsloth what it publishes, ftcore twice that; 0: unknown.

    :param scale: Divides them, where the model is a tiny one.
    """
    return UNSLOTH.get(int(gib), 0) * (TIMES if side == "ftcore" else 1) // scale
