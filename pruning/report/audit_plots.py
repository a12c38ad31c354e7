"""Figures of an audit as functions of arrays."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

BLUE, ORANGE = "#2f6fb0", "#e67e22"
WIDTH = 8.0  # inches, a page


def plot_misalign(
    panels: Sequence[tuple[str, np.ndarray, float | None]], increase: np.ndarray, top: int = 50
) -> Figure:
    """What the experts that a proxy ranks highest are really worth (figure 2).

    Args:
      panels: for each proxy its name, its scores [n] and its Spearman correlation with `increase`.
      increase: [n] loss increase without the expert, nats per token.
      top: experts shown, best first.

    Returns:
      One panel for each proxy: its scores as a falling line, the increases as bars. Bars that fall
      with the line mean a good proxy, orange ones are experts without which the loss is lower.
    """
    shown = min(top, len(increase))
    figure = Figure(figsize=(WIDTH, 0.6 + 2.1 * len(panels)), layout="constrained")
    axes = np.atleast_1d(np.asarray(figure.subplots(len(panels), 1, sharex=True, sharey=True)))
    for axis, (name, score, correlation) in zip(axes, panels, strict=True):
        order = np.argsort(-np.asarray(score), kind="stable")[:shown]
        bars = np.asarray(increase)[order]
        colours = [ORANGE if bar < 0 else BLUE for bar in bars]
        places = np.arange(1, shown + 1)
        axis.bar(places, bars, color=colours, width=0.85)
        rank = "undefined" if correlation is None else f"{correlation:.2f}"
        axis.set_title(f"ranked by {name}: Spearman {rank}", loc="left", fontsize=11)
        axis.axhline(0, color="#777777", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set(xlim=(0.3, shown + 0.7))
        line = axis.twinx()
        scaled = np.asarray(score, float)[order] / max(np.max(np.abs(score)), 1e-300)
        line.plot(places, scaled, color="#444444", linewidth=1.2, marker=".", markersize=3)
        line.spines[["top", "left"]].set_visible(False)
        line.set(ylim=(min(0.0, 1.05 * scaled.min()), 1.05), ylabel="score\n(line)")
        line.yaxis.set_major_formatter(PercentFormatter(1))
    axes[-1].set_xlabel(f"expert, best first (the top {shown} of {len(increase)})")
    figure.supylabel("loss increase without the expert, nats per token", fontsize=10)
    return figure
