"""What block and least width do to a plan, as a figure of measured values."""

import itertools
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from pruning.report.figures import COLOURS, WIDTH, plain

# (block, least width of a kept expert) -> a measured value.
Grid = Mapping[tuple[int, int], float]


def plot_alignment(panels: Mapping[str, Grid]) -> Figure:
    """Values against the least width, one line per block (figure 10).

    Args:
      panels: name with unit, for example "tokens per second" -> the values of each pair of block
        and least width. Pairs may be missing: a least width is at least one block.

    Returns:
      Two panels a row.
    """
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.5 * rows), layout="constrained")
    grid = np.asarray(figure.subplots(rows, 2, squeeze=False)).ravel()
    for axes, (name, values) in zip(grid, panels.items(), strict=False):
        minima = sorted({minimum for _, minimum in values})
        for colour, block in zip(
            itertools.cycle(COLOURS), sorted({b for b, _ in values}), strict=False
        ):
            own = [(minima.index(m), values[b, m]) for b, m in sorted(values) if b == block]
            axes.plot(*zip(*own, strict=True), "o-", color=colour, label=f"blocks of {block}")
        axes.set_xticks(range(len(minima)), [str(minimum) for minimum in minima])
        axes.set(xlabel="least channels of a kept expert", ylabel=name)
        axes.margins(y=0.15)
        plain(axes)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=len(labels))
    return figure
