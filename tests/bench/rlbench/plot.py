"""Reward by step as a figure."""

from __future__ import annotations

from pathlib import Path

from curvebench.compare import smoothed
from curvebench.plot import FTCORE, HF

WINDOW = 20
"""Steps that smoothing averages over."""


def draw(curves: dict[str, list[list[float]]], to: Path) -> None:
    """Every generator's runs, smoothed, over a faint line of the rewards themselves."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # Text stays text, and the file is the same for the same data.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ftcore", "font.size": 9})
    figure, axis = plt.subplots(figsize=(5.6, 3.2))
    for (generator, runs), colour, style in zip(curves.items(), (HF, FTCORE), ("-", "--"), strict=False):
        for number, curve in enumerate(runs):
            steps = range(1, len(curve) + 1)
            smooth = smoothed(curve, WINDOW)
            axis.plot(steps, curve, color=colour, linewidth=0.5, alpha=0.35)
            label = f"generator={generator}" if not number else None
            axis.plot(steps[-len(smooth) :], smooth, color=colour, linewidth=1.6, linestyle=style, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel(f"mean reward, and its mean of {WINDOW} steps")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(to, format="svg", metadata={"Date": None})
    plt.close(figure)
