"""What the choice of calibration text does: every set's plans, measured on every text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pruning.kit.words import percent
from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.drawing import new_figure
from pruning.report.table import TextTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ITSELF = "(calibration)"  # the text that the other tables are of
PANELS = 6  # of the figure: the best rules of each rate, in turns
ACROSS = 3
CAPTION = (
    "Nats per token added. A row is the text that decided what is kept, a column the text that the "
    "loss is measured on, of which no row has shown that part. Darker loses more than the best row "
    "of its column, as a share of the worst of the panel. Framed: a set measured on itself."
)
NOTE = (
    "Nats per token added, by the text that decided what is kept (rows) and the text that it is "
    f"measured on (columns). {ITSELF} is --calibration, or equal parts of all sets. worst: the "
    "largest of the row. kept alike: Jaccard index of what a set keeps and what "
    f"{ITSELF} does."
)


@dataclass(frozen=True)
class Sensitivity:
    """One rule at one rate or size.

    Attributes:
      rule: `Result.name`.
      place: `Result.place`.
      sets: names of the R calibration texts.
      texts: names of the C texts that are measured on.
      added: [R, C] nats per token, seeds averaged.
      alike: [R], as `Result.overlap`.
    """

    rule: str
    place: str
    sets: tuple[str, ...]
    texts: tuple[str, ...]
    added: np.ndarray
    alike: np.ndarray


def sensitivities(found: Comparison) -> list[Sensitivity]:
    """Rules measured with several sets, those of each rate or size together, the best first."""
    groups: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for one in found.results:
        if not one.draw and not one.has_fewer:
            row = one.calibration or ITSELF
            groups.setdefault((one.place, one.name), {}).setdefault(row, []).append(one)
    names = list(dict.fromkeys(one.calibration for one in found.results if one.calibration))
    texts = tuple(found.dense)
    rows = []
    for (place, rule), own in groups.items():
        if any(name not in own for name in names) or not names:
            continue
        sets = (*names, ITSELF) if ITSELF in own else tuple(names)
        added = [[_mean(found, own[name], text) for text in texts] for name in sets]
        alike = [float(np.mean([one.overlap for one in own[name]])) for name in sets]
        rows.append(Sensitivity(rule, place, sets, texts, np.array(added), np.array(alike)))
    order = list(dict.fromkeys(row.place for row in rows))
    return sorted(rows, key=lambda row: (order.index(row.place), row.added.mean()))


def set_tables(found: Comparison) -> list[TextTable]:
    """Loss added by calibration set and text measured on, all rules and rates in one table."""
    if not (every := sensitivities(found)):
        return []
    rows = []
    for one in every:
        for number, name in enumerate(one.sets):
            values = one.added[number]
            shown = [one.rule, one.place] if number == 0 else ["", ""]
            cells = [f"{value:.4f}" for value in (*values, values.mean(), values.max())]
            rows.append([*shown, name, *cells, percent(one.alike[number])])
    header = ["rule", "at", "scored on", *every[0].texts, "mean", "worst", "kept alike"]
    return [TextTable("By calibration set and text measured on", header, rows, NOTE)]


def plot_sets(found: Comparison) -> "Figure":
    """A panel of numbers for the best rules at each rate: set by text."""
    shown = _panels(sensitivities(found))
    rows, columns = -(-len(shown) // ACROSS), min(len(shown), ACROSS)
    figure = new_figure(rows * (1.3 + 0.42 * len(shown[0].sets)))
    panels = np.ravel(np.asarray(figure.subplots(rows, columns, squeeze=False)))
    for axes, one in zip(panels, shown, strict=False):
        _draw(axes, one)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("scored on")
    figure.supxlabel("measured on", fontsize=10)
    return figure


def _panels(every: Sequence[Sensitivity]) -> list[Sensitivity]:
    places = list(dict.fromkeys(one.place for one in every))
    each = max(1, PANELS // len(places))
    chosen = [[one for one in every if one.place == place][:each] for place in places]
    return [one for own in chosen for one in own]


def _draw(axes: "Axes", one: Sensitivity) -> None:
    behind = one.added - one.added.min(axis=0)
    axes.imshow(behind / (behind.max() or 1.0), cmap="Reds", vmin=0, vmax=1.6, aspect="auto")
    for row, column in np.ndindex(*one.added.shape):
        own = one.sets[row] == one.texts[column]
        axes.text(column, row, f"{one.added[row, column]:.3f}", ha="center", va="center",
                  fontsize=8, fontweight="bold" if own else "normal")  # fmt: skip
        if own:
            corners = [-0.47, 0.47, 0.47, -0.47, -0.47]
            axes.plot(np.array(corners) + column, np.roll(corners, 1) + row, color="#222222",
                      linewidth=1)  # fmt: skip
    axes.set_xticks(range(len(one.texts)), one.texts, fontsize=8, rotation=30, ha="right")
    axes.set_yticks(range(len(one.sets)), one.sets, fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{one.rule} at {one.place}", loc="left", fontsize=9)


def _mean(found: Comparison, own: Sequence[Result], text: str) -> float:
    dense = found.dense[text]["nll"]
    values = [one.quality[text]["nll"] - dense for one in own]
    return math.fsum(values) / len(values)
