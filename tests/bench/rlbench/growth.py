"""Memory after every step of a trainer, and whether it grows."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

AFTER = 20
"""Steps in which everything may find its size."""
WINDOW = 20
"""Steps at both ends of the rest that are compared."""
ALLOWED = 0.01
"""Part by which the last ones may have more."""
JUDGED = ("allocated", "reserved", "retries")


class StepMemory(TrainerCallback):
    """Writes a line for every step: bytes of the GPU and of the host, and how often the allocator had to start anew.

    And for how many shapes of batch launches are recorded: of each the graphs hold the outputs of all layers.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """After the optimizer's step."""
        import torch

        found = {"step": state.global_step, "host": psutil.Process().memory_info().rss}
        if torch.cuda.is_available():
            stats = torch.cuda.memory_stats()
            found |= {
                "allocated": stats["allocated_bytes.all.current"],
                "reserved": stats["reserved_bytes.all.current"],
                "peak": stats["allocated_bytes.all.peak"],
                "retries": stats["num_alloc_retries"],
                "shapes": shapes(model),
            }
            torch.cuda.reset_peak_memory_stats()
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(found) + "\n")


def shapes(model: Any) -> int:
    """Shapes of batch whose launches are recorded."""
    graphs = [module.ftcore_recompute.graphs for module in model.modules() if hasattr(module, "ftcore_recompute")]
    return max((one.shapes for one in graphs if one is not None), default=0)


def settled(steps: list[dict[str, int]]) -> int:
    """The step after which no further shape was recorded; 0 where none was at all."""
    numbers = [0, *(one.get("shapes", 0) for one in steps)]
    return max((one["step"] for one, (a, b) in zip(steps, pairwise(numbers), strict=True) if a != b), default=0)


def read(file: Path) -> list[dict[str, int]]:
    """The lines; none where there was no step."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def growth(steps: list[dict[str, int]], after: int = AFTER) -> dict[str, tuple[float, float]]:
    """Number to its size soon after the first steps, and at the end: medians; the most for what is never given back.

    Steps in which shapes of batch are recorded are first ones, too. Empty where there are too few steps to compare.
    """
    after = max(after, settled(steps))
    rest = [one for one in steps if one["step"] > after]
    window = min(WINDOW, len(rest) // 2)
    if not window:
        return {}
    found = {}
    for name in rest[0]:
        if name not in ("step", "shapes"):
            take = statistics.median if name in ("allocated", "host") else max
            first, last = ([one[name] for one in part] for part in (rest[:window], rest[-window:]))
            found[name] = float(take(first)), float(take(last))
    return found


def grown(found: dict[str, tuple[float, float]]) -> list[str]:
    """The numbers that may not grow, and did."""
    return [name for name in JUDGED if name in found and found[name][1] > found[name][0] * (1 + ALLOWED)]


def said(found: dict[str, tuple[float, float]]) -> str:
    """First and last of every number."""
    words = [
        f"{name} {first:.0f} to {last:.0f}" if name == "retries"
        else f"{name} {first / 2**20:,.1f} to {last / 2**20:,.1f} MiB ({100 * (last - first) / max(first, 1):+.2f} %)"
        for name, (first, last) in found.items()
    ]  # fmt: skip
    return ", ".join(words) or "too few steps to compare"
