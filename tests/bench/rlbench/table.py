"""Results of a trainer as a table, and what they say."""

from __future__ import annotations

import math
from typing import Any

from stepbench import table

Results = dict[str, dict[str, Any]]

AGREE = 0.005
"""Part by which the first losses may differ, or"""
NEAR = 1e-3
"""by so much, near 0."""
GRADIENT = 0.05
"""Part by which the norms of the first gradients may differ: at the first step a preference loss is the same for all
answers, and only its gradient shows that the sides train on the same tokens."""
MEMORY, SPEED = 0.6, 1.3
"""Targets: memory above the weights, and tokens a second, times TRL's."""
HEADS = (
    *("tok/s", "x trl", "ms/step", "weights", "peak GiB", "above", "x trl"),
    *("reserved", "first loss", "gradient"),
)


def rows(results: Results) -> str:
    """Every side of a trainer."""
    trl, lines = results.get("trl", {"status": "missing"}), [f"{'':20}" + "".join(f"{head:>11}" for head in HEADS)]
    for label, r in results.items():
        if r["status"] != "ok":
            lines.append(f"{label:20}  failed")
            continue
        cells = [
            *(f"{r['tokens_per_second']:,.0f}", ratio(r, trl, "tokens_per_second"), f"{r['step_ms']:,.1f}"),
            *(f"{r['base_gib']:.2f}", f"{r['peak_gib']:.2f}", f"{r['above_gib']:.2f}", ratio(r, trl, "above_gib")),
            *(f"{r['reserved_gib']:.2f}", f"{r['first_loss']:.5f}", f"{r['first_gradient']:.4f}"),
        ]
        lines.append(f"{label:20}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def ratio(result: dict[str, Any], other: dict[str, Any], key: str) -> str:
    """A number over the other side's."""
    times = over(result, other, key)
    return "" if times is None else f"{times:.2f}"


def over(result: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    """The same as a number; None where there is nothing to divide by."""
    known = result["status"] == other["status"] == "ok" and other[key]  # a CPU's memory is not measured
    return result[key] / other[key] if known else None


def agree(results: Results) -> bool:
    """Whether the first losses are one loss."""
    losses = [r["first_loss"] for r in results.values() if r["status"] == "ok"]
    return bool(losses) and all(math.isclose(loss, losses[0], rel_tol=AGREE, abs_tol=NEAR) for loss in losses)


def same_start(results: Results) -> bool:
    """Whether the adapters begin as the same numbers."""
    return len({r["adapter_at_start"] for r in results.values() if r["status"] == "ok"}) < 2


def gradients_agree(results: Results) -> bool:
    """Whether the norms of the first gradients are one norm; nothing is known of adapters that begin differently."""
    norms = [r["first_gradient"] for r in results.values() if r["status"] == "ok"]
    return not same_start(results) or all(math.isclose(n, norms[0], rel_tol=GRADIENT) for n in norms)


def good(results: Results) -> bool:
    """Whether the sides did the same work, and none failed."""
    same = agree(results) and gradients_agree(results) and table.trained_alike(results)
    return same and all(r["status"] == "ok" for r in results.values())


def verdicts(results: Results) -> list[str]:
    """Agreement, and every side of ftcore's against the targets."""
    losses = f"first losses agree within {100 * AGREE:.1f} % or {NEAR}"
    found = [losses if agree(results) else "FIRST LOSSES DISAGREE, or no side ran"]
    if not same_start(results):
        found.append("adapters begin as other numbers: first gradients are not compared")
    else:
        norms = f"norms of the first gradients agree within {100 * GRADIENT:.0f} %"
        found.append(norms if gradients_agree(results) else "FIRST GRADIENTS DISAGREE")
    counts = {label: r["trained"] for label, r in results.items() if r["status"] == "ok"}
    if table.trained_alike(results):
        found.append(f"{next(iter(counts.values()), 0):,} parameters are trained on every side")
    else:
        found.append("OTHER PARAMETERS ARE TRAINED: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
    return found + [said for label in results if (said := _targets(label, results))]


def _targets(label: str, results: Results) -> str:
    trl = results.get("trl", {"status": "missing"})
    memory, speed = (over(results[label], trl, key) for key in ("above_gib", "tokens_per_second"))
    if label == "trl" or speed is None:
        return ""
    words = [f"speed {speed:.2f} times TRL's ({'reaches' if speed >= SPEED else 'UNDER'} {SPEED})"]
    if memory is not None:
        word = "within" if memory <= MEMORY else "OVER"
        words.append(f"memory above the weights {memory:.2f} of TRL's ({word} {MEMORY})")
    return f"{label}: {', '.join(words)}"
