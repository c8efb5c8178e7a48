"""One side's share of a preference step."""

from __future__ import annotations

from dataclasses import dataclass

from stepbench.works import Work

TRAINERS = ("dpo", "kto", "grpo")


@dataclass(frozen=True)
class TrainerWork(Work):
    """The step of a trainer; `rows` are its sequences of `length` tokens."""

    trainer: str = "dpo"
    prompt: int = 512
    """Tokens of a prompt, the template's included; the rest of a sequence is the answer."""
    generator: str = "transformers"
    """ftcore's, where completions are not given."""
    prompts: int = 1
    """Prompts of a GRPO step; its rows are their completions."""
    shared: bool = False
    """Whether ftcore reads GRPO's prompts once for all their completions."""
    budget: float = 0.0
    """Seconds of whole GRPO steps after which a side makes no more, once one is timed; 0: it makes them all."""

    @property
    def batch(self) -> int:
        """Rows of the data set in a step: a row of DPO's has two sequences."""
        return self.rows // 2 if self.trainer == "dpo" else self.rows

    @property
    def group(self) -> int:
        """Completions of a prompt."""
        return self.rows // self.prompts

    def title(self) -> str:
        """The work in a line."""
        what = {
            "dpo": f"{self.batch} pairs of {self.length} tokens",
            "kto": f"{self.rows} rows of {self.length} tokens, and as many mismatched ones for the baseline",
            "grpo": f"{self.rows} given completions of one prompt, {self.length} tokens with it; nothing is generated",
        }[self.trainer]
        return f"{self.trainer}: {what}; {self.shape}, {self.dtype}, LoRA r{self.rank}, kernels={self.kernels}"
