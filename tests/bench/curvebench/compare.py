"""How far the curves are apart, against how far seeds are apart."""

from __future__ import annotations

from itertools import combinations
from typing import Any

Curve = list[float]

WINDOW = 10
"""Steps that smoothing averages over."""


def smoothed(curve: Curve, window: int = WINDOW) -> Curve:
    """Moving average of whole windows; the curve itself where it is shorter than one."""
    window = min(window, len(curve))
    return [sum(curve[i : i + window]) / window for i in range(len(curve) - window + 1)]


def mean(curves: list[Curve]) -> Curve:
    """The mean of the seeds at every step."""
    return [sum(values) / len(values) for values in zip(*curves, strict=True)]


def gap(one: Curve, other: Curve) -> float:
    """Mean absolute difference; NaN stays NaN."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def gaps(hf: list[Curve], ftcore: list[Curve]) -> dict[str, float]:
    """Between the mean curves, between runs of the same seed, and the largest between two seeds of plain HF."""
    return {
        "means": gap(mean(hf), mean(ftcore)),
        "same_seed": max(gap(a, b) for a, b in zip(hf, ftcore, strict=True)),
        "hf_seeds": max((gap(a, b) for a, b in combinations(hf, 2)), default=0.0),
    }


def curves(kept: dict[str, Any], side: str) -> list[Curve]:
    """A side's curves in the order of the seeds."""
    return [kept["runs"][f"{side}-{seed}"]["losses"] for seed in kept["seeds"]]


def report(kept: dict[str, Any]) -> str:
    """Gaps, raw and smoothed, and whether ftcore stays within what the seed alone does."""
    hf, ftcore = curves(kept, "hf"), curves(kept, "ftcore")
    lines = [f"{kept['dtype']}, {len(hf)} seeds, {len(hf[0])} steps, {kept['gpu']}"]
    within = True
    for name, h, f in (("raw", hf, ftcore), (f"smoothed {WINDOW}", *(list(map(smoothed, s)) for s in (hf, ftcore)))):
        found = gaps(h, f)
        within &= found["means"] <= found["hf_seeds"]
        lines.append(
            f"  {name:12} mean curves {found['means']:.5f} apart; plain HF's seeds up to {found['hf_seeds']:.5f}; "
            f"same seed up to {found['same_seed']:.5f}"
        )
    ends = [sum(curve[-1] for curve in map(smoothed, side)) / len(side) for side in (hf, ftcore)]
    lines.append(f"  last {WINDOW} steps: plain HF {ends[0]:.4f}, ftcore {ends[1]:.4f}")
    same = all(
        kept["runs"][f"hf-{seed}"]["adapter_at_start"] == kept["runs"][f"ftcore-{seed}"]["adapter_at_start"]
        for seed in kept["seeds"]
    )
    lines.append(f"  adapters at the start: {'the same' if same else 'DIFFERENT'}")
    skipped = {name: run["skipped_steps"] for name, run in kept["runs"].items() if run["skipped_steps"]}
    if skipped:
        lines.append(f"  steps skipped by loss scaling: {', '.join(f'{name} {n}' for name, n in skipped.items())}")
    verdict = "within the gap between plain HF's own seeds" if within else "FURTHER APART than plain HF's own seeds"
    if not same or len(hf) < 2:
        verdict = "none, one seed has nothing to compare with" if same else "none, the runs start differently"
    return "\n".join([*lines, f"  verdict: {verdict}"])
