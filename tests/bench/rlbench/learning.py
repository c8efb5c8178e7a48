"""Commands that learn a puzzle by rewards, and how far their rewards came."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW = 20
"""Steps at both ends that are compared."""
GAIN = 0.2
"""How much more reward the last of them must have."""

TASKS: dict[str, list[str]] = {
    "syllogism": ['data.system="Reply with a single word: Yes or No."'],
    "ransom_note": [
        "data.options={max_note_length: 4, max_magazine_length: 8}",
        'data.system="Reply with a single word: True or False."',
    ],
    "chain_sum": [
        "data.options={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}",
        'data.system="Reply with a single number. For example, the answer to 3 + 4 = is: 7"',
    ],
}
"""Puzzle to what it takes. A scorer gives an answer that stands among other words its part of the letters, so that
brevity is learnt first. At temperature 1 the untrained SmolLM2-135M has a mean reward of 0.02 to 0.05 (syllogism), 0.42
(ransom_note) and 0.01 (chain_sum, whose bare numbers it gets right by chance only: 0.15 after 20 steps of 16)."""

TRAINERS: dict[str, list[str]] = {
    "grpo": ["trainer.num_generations=8"],
    "ppo": ["trainer.num_ppo_epochs=2", "trainer.kl_coef=0.001"],
}
"""Trainer to what it takes besides `SHARED`."""
SHARED = [
    "adapter.r=16",
    "adapter.alpha=32",
    "trainer.warmup=5",
    "trainer.schedule=constant_with_warmup",
    "trainer.logging_steps=1",
    "data.size=1000",
    "+reward=[reasoning_gym]",
    "memory=off",
]


@dataclass(frozen=True)
class Learning:
    """A run."""

    trainer: str
    task: str
    seed: int
    """Of the rows, of their order, of the adapter and of sampling."""
    steps: int
    size: int
    """Completions of a step."""
    new: int
    """Tokens of the longest completion."""
    rate: float
    temperature: float
    tiny: bool
    more: tuple[str, ...] = ()
    """Further words of the command line, which win over all others."""

    def words(self, folder: Path) -> list[str]:
        """The command line after `ftcore`."""
        set_here = [
            f"+trainer={self.trainer}",
            "data=reasoning_gym",
            f"data.task={self.task}",
            f"data.seed={self.seed}",
            f"trainer.seed={self.seed}",
            f"trainer.max_steps={self.steps}",
            f"trainer.micro_batch={self.size}",
            f"trainer.global_batch={self.size}",
            f"trainer.max_completion_length={self.new}",
            f"trainer.learning_rate={self.rate}",
            f"trainer.temperature={self.temperature}",
            f"output_dir={folder}",
        ]
        model = ["+model=smollm2", *(["model.tiny=true"] if self.tiny else [])]
        words = [*model, *set_here, *SHARED, *TASKS[self.task], *TRAINERS[self.trainer]]
        given = {word.partition("=")[0].lstrip("+") for word in self.more}
        return [word for word in words if word.partition("=")[0].lstrip("+") not in given] + list(self.more)


def rewards(folder: Path) -> dict[int, float]:
    """Step to mean reward: every step of GRPO, those of PPO that began with a rollout; none where there was no run."""
    file = folder / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return {entry["step"]: entry["reward"] for entry in entries if entry.get("reward") is not None}


def ends(found: dict[int, float], steps: int) -> tuple[float, float]:
    """Mean reward of the first and of the last steps."""
    first = [reward for step, reward in found.items() if step <= WINDOW]
    last = [reward for step, reward in found.items() if step > steps - WINDOW]
    return sum(first) / len(first), sum(last) / len(last)


def verdict(gains: dict[str, float]) -> str:
    """Whether every seed learnt."""
    short = [seed for seed, gain in gains.items() if not gain >= GAIN]
    if not gains:
        return "verdict: NO RUN"
    return f"verdict: {'NOT ' if short else ''}at least {GAIN} more reward in each of {len(gains)} seeds"
