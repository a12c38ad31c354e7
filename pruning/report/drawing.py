"""What all figures share: width, colours, bare axes, and how one becomes part of a page.

matplotlib is imported when something is drawn: it would be a third of the start of every command.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from pruning.report.html import piece

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import Formatter

DOTS = 150  # per inch: sharp at page width, some 50 kB a figure
WIDTH = 8.0  # inches, a page
GREY, BLUE, RED, GOLD = "#777777", "#2f6fb0", "#c0392b", "#d9a400"
GREEN, PURPLE, ORANGE = "#2e8b57", "#7d3c98", "#e67e22"
COLOURS = (BLUE, RED, GOLD, GREEN, PURPLE)  # of lines, in this order


def new_figure(height: float) -> "Figure":
    """An empty figure as wide as a page, its height in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), layout="constrained")


def percent_format() -> "Formatter":
    """Writes shares of one in percent."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1)


def whole_ticks(axes: "Axes") -> None:
    """Ticks of the x axis at whole numbers alone."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def patch(colour: str, label: str) -> "Patch":
    """A colour for a legend."""
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def colours_of(name: str, places: np.ndarray) -> np.ndarray:  # [N] of 0 to 1 -> [N, 4]
    """Colours of one of matplotlib's scales."""
    from matplotlib import colormaps

    return colormaps[name](places)


def plain(axes: "Axes", percent: str = "", grid: str = "y") -> None:
    """Only the two axes that carry numbers, a quiet grid along one of them.

    Args:
      axes: to change.
      percent: names of the axes that count in percent, such as "xy".
      grid: the axis whose ticks have lines.
    """
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x" if grid == "x" else "y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for name in percent:
        getattr(axes, f"{name}axis").set_major_formatter(percent_format())


def layer_colours(layers: int) -> tuple[np.ndarray, list[int]]:
    """A colour for every layer, and those in a legend: all if few, else first, middle, last."""
    colours = colours_of("viridis", np.linspace(0, 0.9, layers))
    few = layers <= 6
    return colours, list(range(layers)) if few else [0, layers // 2, layers - 1]


def limit_height(axes: "Axes", values: Sequence[float]) -> None:
    """Cut the y axis where one value, such as that of a broken model, would flatten all others."""
    ordered = sorted(values)
    typical = ordered[math.floor(0.9 * (len(ordered) - 1))]
    if ordered[-1] > 3 * typical > 0:
        axes.set_ylim(min(0.0, ordered[0]), 1.5 * typical)


def figure_html(figure: "Figure", caption: str) -> Markup:
    """A figure as a picture inside the page, with its caption."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS)
    return piece("figure", base64.b64encode(buffer.getvalue()).decode(), caption)
