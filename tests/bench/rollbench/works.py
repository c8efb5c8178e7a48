"""Whose completions are timed: the rows of work by name, and one side's share of a row."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from stepbench.works import Work

SIDES = ("hf", "unsloth", "ftcore")
EVEN = {"rows": 16, "prompt": 128}

ROWS: dict[str, dict[str, Any]] = {
    "1b": {**EVEN, "shape": "llama3.2-1b", "new": 256},
    "8b": {**EVEN, "shape": "llama3.1-8b", "new": 128},
    "8b-nf4": {**EVEN, "shape": "llama3.1-8b", "new": 128, "quantizer": "bnb_nf4"},
    "0.6b-mixed": {"family": "qwen3", "shape": "qwen3-0.6b", "rows": 512, "group": 8, "prompt": 256, "new": 512},
}
"""Row to the options that it sets; options on the command line win over them."""

TINY = {"shape": "tiny", "rows": 6, "prompt": 12, "new": 10}


@dataclass(frozen=True)
class RollWork(Work):
    """Rows are completions; all are as long as they may be, but where there are groups."""

    prompt: int = 128
    """Tokens of a prompt; the longest where there are groups."""
    new: int = 256
    """Tokens of a completion; the longest where there are groups."""
    group: int = 0
    """Completions of a prompt, of mixed lengths; 0: rows of one length and a prompt each."""
    batch: int = 0
    """Rows that a peer completes at once; 0: all."""
    parts: int = 0
    """Batches that a peer completes; 0: all. Its rate is theirs."""
    weights: str = ""
    """Whether ftcore unpacks 4-bit weights for a rollout or reads them `packed`; empty leaves it to ftcore."""

    def title(self) -> str:
        """The work in a line."""
        weights = self.dtype if self.quantizer == "none" else self.quantizer
        if self.group:
            what = f"{self.rows // self.group} prompts of up to {self.prompt} tokens, {self.group} completions each"
            return f"{self.shape}, {weights}, LoRA r{self.rank}, {what} of up to {self.new} tokens, greedy"
        return f"{self.shape}, {weights}, LoRA r{self.rank}, {self.rows} x ({self.prompt} + {self.new}) tokens, greedy"

    def lengths(self) -> list[int]:
        """Tokens of every completion: from a seed, the same for all sides."""
        drawn = random.Random(2)
        return [drawn.randint(max(1, self.new // 32), self.new) if self.group else self.new for _ in range(self.rows)]

    def prompts(self, vocabulary: int) -> list[list[int]]:
        """Token ids of every row's prompt."""
        drawn = random.Random(1)
        size = self.group or 1
        short = max(1, self.prompt // 8)
        found: list[list[int]] = []
        for _ in range(self.rows // size):
            length = drawn.randint(short, self.prompt) if self.group else self.prompt
            found += [[drawn.randrange(vocabulary) for _ in range(length)]] * size
        return found
