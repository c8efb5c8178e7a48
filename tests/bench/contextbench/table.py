"""Rows of results, and what they say."""

from __future__ import annotations

import math
from typing import Any

from contextbench.works import SPEED, SPEED_GIB

Result = dict[str, Any]

NEAR = 0.1
"""Part by which a first loss may differ from the logarithm of the vocabulary: random weights know nothing."""
GIB = 2**30
HEADS = ("cap", "side", "tokens", "layers", "wanted", "outcome", "peak", "forecast", "reserved", "outside", "host",
         "booked", "s/step", "forecast", "loss")  # fmt: skip
WIDTHS = (6, 9, 10, 8, 10, 14, 8, 10, 10, 9, 8, 8, 9, 10, 9)


def sound(result: Result, vocabulary: int) -> str:
    """What is wrong with the losses and gradients of a side that ran; nothing, as a rule."""
    numbers = [*result["losses"], *result["gradients"]]
    if not all(map(math.isfinite, numbers)):
        return "a loss or a gradient is no finite number"
    chance = math.log(vocabulary)
    if abs(result["first_loss"] - chance) > NEAR * chance:
        return f"the first loss is {result['first_loss']:.3f}, not near {chance:.3f}"
    return "" if min(result["gradients"]) > 0 else "there is no gradient"


def table(rows: list[Result]) -> str:
    """A line for every trial; memory in GiB: the peak with what the cut layers hold, and the host's part."""
    lines = ["".join(f"{head:>{width}}" for head, width in zip(HEADS, WIDTHS, strict=True))]
    return "\n".join([*lines, *map(line, rows)])


def line(row: Result) -> str:
    """One trial."""
    cells = [f"{row['gib']:g}" if row["gib"] else "-", row["side"], f"{row['tokens']:,}", str(row["depth"])]
    cells += [f"{row['wanted']:,}" if row["wanted"] else "-", row["outcome"]]
    result = row.get("result", {"status": ""})
    if result["status"] == "ok":
        planned = result.get("planned_peak_gib", 0.0)
        cells += [f"{result['peak_gib']:.2f}", f"{planned + result['ballast_gib']:.2f}" if planned else "-"]
        cells += [f"{result['reserved_gib']:.2f}", f"{result['outside_gib']:.2f}"]
        cells += [f"{result.get(name, 0.0):.2f}" for name in ("planned_host_gib", "booked_gib")]
        cells += [f"{result['step_ms'] / 1000:.1f}", f"{row['seconds']:.1f}", f"{result['first_loss']:.3f}"]
    else:
        cells += ["-"] * 7 + [f"{row['seconds']:.1f}", "-"]
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def speeds(results: dict[str, Result], tokens: int) -> list[str]:
    """Every side's speed and memory, and ftcore's against the others and against what is wanted at 65,536 tokens."""
    good = {side: result for side, result in results.items() if result["status"] == "ok"}
    lines = []
    for side, result in good.items():
        rate, peak = result["tokens_per_second"], result["peak_gib"]
        words = [f"{side}: {rate:,.0f} tok/s at {peak:.2f} GiB, first loss {result['first_loss']:.4f}"]
        if side == "ftcore":
            words += [
                f"{rate / other['tokens_per_second']:.2f} times {name}'s speed"
                + (f" at {peak / other['peak_gib']:.2f} times its memory" if other["peak_gib"] else "")
                for name, other in good.items()
                if name != side
            ]
        if side == "ftcore" and tokens == 65536:
            words.append(f"{SPEED:,} wanted: {'reached' if rate >= SPEED else 'MISSED'}")
            words.append(f"at most {SPEED_GIB} GiB: {'reached' if peak <= SPEED_GIB else 'MISSED'}")
        lines.append("; ".join(words))
    return lines
