"""A sweep as one self-contained page: size against loss, and the loss of every text."""

from pathlib import Path
from typing import TYPE_CHECKING

from moe_jax.files import replace_text
from pruning.report.drawing import COLOURS, GREY, figure_html, new_figure, plain
from pruning.report.html import document, section_html, text_html
from pruning.report.rates import Sweep, SweepPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = (*COLOURS, GREY)


def save(found: Sweep, folder: Path) -> None:
    """Write sweep.html, whole or not at all."""
    replace_text(folder / "sweep.html", sweep_page(found))


def sweep_page(found: Sweep) -> str:
    """The whole page."""
    size = (
        "One line per export format, one point per prune rate (percent removed at each point); the "
        "point without a number is the dense model. Further left is smaller, lower is better. "
    )
    if found.texts:
        title = "What does a prune rate cost?"
        size += "The loss is that of 16-bit weights in every format: rounding to 4 bits adds to it."
    else:
        title = "What does a prune rate remove?"
        size += (
            "No text was measured: the height is the share of the channel score that goes, which "
            "ranks plans but is no loss. `moe-compress eval` with the same rates measures it."
        )
    figures = [(plot_sizes(found), size)]
    if len(found.texts) > 1:
        figures.append((plot_texts(found), "One line per text. Lower is better."))
    parts = [text_html(title, "h1"), *(figure_html(*one) for one in figures)]
    return document(title, [*parts, section_html(found.table())])


def plot_sizes(found: Sweep) -> "Figure":
    """Megabytes of each format against what is lost; the lower left is the Pareto front."""
    figure = new_figure(4.6)
    axes = figure.subplots()
    smallest = min(found.dense.sizes, key=lambda name: found.points[-1].sizes[name])
    for name, colour in zip(found.dense.sizes, LINES, strict=False):
        # On the outer side of several formats, where no line passes; above a single, falling one.
        side = -1 if name == smallest and len(found.dense.sizes) > 1 else 1
        points = [(point.sizes[name] / 1e6, _lost(found, point)) for point in found.points]
        dense = (found.dense.sizes[name] / 1e6, 0.0)
        axes.plot(*zip(dense, *points, strict=True), "o-", color=colour, label=name, markersize=5)
        for point, place in zip(found.points, points, strict=True):
            axes.annotate(
                f"{100 * point.rate:.4g}%", place, xytext=(6 * side, 4), textcoords="offset points",
                fontsize=8, color=colour, ha="right" if side < 0 else "left",
            )  # fmt: skip
    _from_zero(axes)
    axes.set(xlabel="size of the export, MB", ylabel=_lost_label(found))
    axes.set_title("Size against loss" if found.texts else "Size against score", loc="left")
    axes.legend(frameon=False, loc="upper right")
    plain(axes, "" if found.texts else "y")
    return figure


def plot_texts(found: Sweep) -> "Figure":
    """Nats per token added to every text against the prune rate."""
    figure = new_figure(4.2)
    axes = figure.subplots()
    rates = [0.0, *(point.rate for point in found.points)]
    for number, text in enumerate(found.texts):
        added = [0.0, *(found.added(point, text) for point in found.points)]
        axes.plot(
            rates, added, marker="o", color=LINES[number % len(LINES)], label=Path(text).name,
            markersize=5, linestyle="-" if number < len(LINES) else "--",
        )  # fmt: skip
    _from_zero(axes)
    axes.set(xlabel="expert channels removed", ylabel="nats per token added")
    axes.set_title("Loss of every text", loc="left")
    axes.legend(frameon=False, loc="upper left")
    plain(axes, "x")
    return figure


def _lost(found: Sweep, point: SweepPoint) -> float:
    return found.mean_added(point) if found.texts else 1.0 - point.coverage


def _lost_label(found: Sweep) -> str:
    if not found.texts:
        return f"share of {found.criterion} removed"
    return "nats per token added" + (", mean over texts" if len(found.texts) > 1 else "")


def _from_zero(axes: "Axes") -> None:
    axes.margins(x=0.08, y=0.12)
    axes.axhline(0.0, color=GREY, linewidth=0.8)
