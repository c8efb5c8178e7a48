"""Results as a table, and what they say."""

from __future__ import annotations

from typing import Any

Results = dict[str, dict[str, Any]]

AGREE = 0.005
"""Part by which the first losses may differ."""
OVERHEAD = 1.05
"""Times the bare loop's step that ftcore's trainer may take."""


def line(label: str, result: dict[str, Any]) -> str:
    """A side's result in a line, for when it comes."""
    if result["status"] == "missing":
        return f"{label}: not installed"
    if result["status"] == "failed":
        return f"{label}: failed, {result['detail']}"
    return f"{label}: {result['tokens_per_second']:,.0f} tok/s, {result['peak_gib']:.2f} GiB, {result['seconds']:.0f} s"


def table(results: Results) -> str:
    """Every side: tokens a second, ratios to the others, milliseconds, memory, first loss."""
    good = {label: r for label, r in results.items() if r["status"] == "ok"}
    others = [label for label in good if not label.startswith("ftcore")]
    heads = ["tok/s", "ms/step", *(f"x {label}" for label in others), "peak GiB", "reserved", "host GiB", "first loss"]
    lines = [f"{'':20}" + "".join(f"{head:>11}" for head in heads)]
    for label, result in results.items():
        if label not in good:
            lines.append(f"{label:20}  " + ("not installed" if result["status"] == "missing" else "failed"))
            continue
        speed = result["tokens_per_second"]
        ratios = [f"{speed / good[other]['tokens_per_second']:.2f}" for other in others]
        memory = [f"{result[key]:.2f}" for key in ("peak_gib", "reserved_gib", "host_gib")]
        cells = [f"{speed:,.0f}", f"{result['step_ms']:,.1f}", *ratios, *memory, f"{result['first_loss']:.4f}"]
        lines.append(f"{label:20}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def machine(results: Results) -> str:
    """The GPU, and the versions of every side's environment, each named once."""
    good = [r for r in results.values() if r["status"] == "ok"]
    pairs = {f"{package} {version}": None for r in good for package, version in r["versions"].items()}
    return "; ".join([*dict.fromkeys(r["gpu"] for r in good), ", ".join(pairs)])


def agree(results: Results) -> bool:
    """Whether the first losses are one loss, as far as rounding goes."""
    losses = [r["first_loss"] for r in results.values() if r["status"] == "ok"]
    # A loss that is no number fails the comparison.
    return bool(losses) and all(abs(loss - losses[0]) <= AGREE * abs(losses[0]) for loss in losses)


def trained_alike(results: Results) -> bool:
    """Whether all sides that counted them train as many parameters."""
    return len({r["trained"] for r in results.values() if "trained" in r}) < 2


def verdicts(results: Results) -> list[str]:
    """Agreement of the losses, and what ftcore's trainer costs over the bare loop."""
    same = f"first losses agree within {100 * AGREE:.1f} %"
    found = [same if agree(results) else "FIRST LOSSES DISAGREE, or no side ran"]
    if not trained_alike(results):
        counts = ", ".join(f"{label} {r['trained']:,}" for label, r in results.items() if "trained" in r)
        found.append(f"OTHER PARAMETERS ARE TRAINED: {counts}")
    for label, result in results.items():
        bare = results.get(label.replace("ftcore_trainer", "ftcore"))
        if label.startswith("ftcore_trainer") and bare and {bare["status"], result["status"]} == {"ok"}:
            times = result["free_ms"] / bare["free_ms"]
            word = "within" if times <= OVERHEAD else "OVER"
            found.append(
                f"{label}: {result['free_ms']:.1f} ms a step when not waited for, {times:.3f} times the bare loop's "
                f"{bare['free_ms']:.1f} ({word} {OVERHEAD})"
            )
    return found
