"""The curves as a figure: a panel for each dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from curvebench.compare import WINDOW, curves, mean, smoothed

HF, FTCORE = "#8a8f98", "#d1495b"


def draw(kept: list[dict[str, Any]], to: Path) -> None:
    """Plain HF's mean in the band of its seeds, and ftcore's mean, both smoothed."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # Text stays text, and the file is the same for the same data.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ftcore", "font.size": 9})
    figure, axes = plt.subplots(1, len(kept), figsize=(4.2 * len(kept), 3.2), sharey=True, squeeze=False)
    for axis, one in zip(axes[0], kept, strict=True):
        hf, ftcore = ([smoothed(curve) for curve in curves(one, side)] for side in ("hf", "ftcore"))
        first = min(WINDOW, len(curves(one, "hf")[0]))
        steps = range(first, first + len(hf[0]))
        low, high = ([pick(values) for values in zip(*hf, strict=True)] for pick in (min, max))
        axis.fill_between(steps, low, high, color=HF, alpha=0.25, linewidth=0, label="plain HF, seeds")
        axis.plot(steps, mean(hf), color=HF, linewidth=1.6, label="plain HF, mean")
        axis.plot(steps, mean(ftcore), color=FTCORE, linewidth=1.1, linestyle="--", label="ftcore, mean")
        axis.set_title(", ftcore's base in ".join(filter(None, (one["dtype"], one["run"].get("quantizer")))))
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"training loss, mean of {WINDOW} steps")
    axes[0][-1].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(to, format="svg", metadata={"Date": None})
    plt.close(figure)
