"""A comparison as one self-contained page: loss against prune rate, and the ranking."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from pruning.report.compared import MERGED, Line
from pruning.report.comparison import Comparison
from pruning.report.comparison_compute import CAPTION as COMPUTE
from pruning.report.comparison_compute import compute_tables, plot_compute
from pruning.report.comparison_draws import draw_tables
from pruning.report.comparison_sets import CAPTION as SETS
from pruning.report.comparison_sets import plot_sets, set_tables
from pruning.report.comparison_sizes import CAPTION, plot_sizes, size_tables
from pruning.report.comparison_tasks import CAPTION as TASKS
from pruning.report.comparison_tasks import plot_tasks, task_tables
from pruning.report.drawing import (
    BLUE,
    GOLD,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    figure_html,
    limit_height,
    new_figure,
    plain,
)
from pruning.report.html import document, long_section, section_html, text_html
from pruning.report.table import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "compare.html"  # the last file that a comparison writes
FAMILY_COLOURS = {
    "paper's rule": BLUE, "one level": RED, "top-k": PURPLE, "uniform": GOLD,
    "whole experts": GREEN, MERGED: ORANGE, "random": GREY,
}  # fmt: skip
OTHER = "#222222"  # of families that are not ours, and of rules that do not say theirs
RANKING = (
    "All rules at one prune rate, best on top. Colours as above. A bar across a point spans its "
    "seeds; smaller differences than that mean nothing."
)
RATES = (
    "One line per rule. Lower is better. All rules keep the same number of channels at a rate, so "
    "points above each other are models of one size in the same bits."
)
PARETO = (
    "The rule of each family that loses least at the smallest size. Further left is smaller, lower "
    "is better: a family whose line lies below all others is on the Pareto front. The point at the "
    "right end is the dense model."
)


def save(found: Comparison, folder: Path) -> None:
    """Write the page, whole or not at all."""
    replace_text(folder / PAGE, comparison_page(found))


def comparison_page(found: Comparison) -> str:
    """The whole page."""
    has_front = found.sizes and any(line.bits == 16 for line in found.lines())
    parts = [
        text_html("Which rule loses least?", "h1"),
        *_section(found, size_tables, plot_sizes, CAPTION),
        *_section(found, compute_tables, plot_compute, COMPUTE),
        *_section(found, task_tables, plot_tasks, TASKS),
        *_section(found, set_tables, plot_sets, SETS),
        *([figure_html(plot_rates(found), RATES)] if found.rates else []),
        *(
            part
            for rate in found.rates
            if any(line.rate == rate for line in found.lines())
            for part in (
                figure_html(plot_ranking(found, rate), RANKING),
                long_section(found.rate_table(rate)),
            )
        ),
        *([figure_html(plot_pareto(found), PARETO)] if has_front else []),
        *map(long_section, draw_tables(found)),
        *([section_html(_refused(found))] if found.refused else []),
    ]
    return document("Comparison of pruning rules", parts)


def _section(
    found: Comparison,
    tables: Callable[[Comparison], list[TextTable]],
    plot: Callable[[Comparison], "Figure"],
    caption: str,
) -> list[Markup]:
    """A figure and its tables; nothing where there are none."""
    shown = tables(found)
    return [figure_html(plot(found), caption), *map(long_section, shown)] if shown else []


def plot_rates(found: Comparison) -> "Figure":
    """Added nats against prune rate; the lower envelope is the Pareto front."""
    figure = new_figure(4.6)
    axes = figure.subplots()
    best = {rate: min((x for x in found.lines() if x.rate == rate), key=lambda x: x.added).rule
            for rate in {line.rate for line in found.lines()}}  # fmt: skip
    alone = {line.bits: line.added for line in found.points() if line.rate == 0}
    families = set()
    for rule in reversed(found.ranked()):
        lines = [line for line in found.lines() if line.rule == rule]
        points, family = [(line.rate, line.added) for line in lines], lines[0].family
        label = None if family in families else family or "other"
        families.add(family)
        leads = rule in best.values()
        axes.plot(
            *zip((0.0, alone.get(lines[0].bits, 0.0)), *points, strict=True), marker="o",
            markersize=4, label=label,
            color=_colour(family), linewidth=2.4 if leads else 0.8, alpha=1.0 if leads else 0.5,
        )  # fmt: skip
    for rate, rule in best.items():
        added = min(line.added for line in found.lines() if line.rate == rate)
        axes.annotate(rule, (rate, added), xytext=(6, -10), textcoords="offset points", fontsize=8)
    plain(axes, "x")
    limit_height(axes, [line.added for line in found.lines()])
    axes.margins(x=0.12)
    axes.set(xlabel="expert channels removed", ylabel="nats per token added")
    axes.set_title("Loss against prune rate", loc="left")
    axes.legend(frameon=False, loc="upper left")
    return figure


def plot_pareto(found: Comparison) -> "Figure":
    """Size of the 16-bit model against added nats for the best rule of each family (figure 9).

    Raises:
      InputError: the comparison has no sizes.
    """
    if not found.sizes:
        raise InputError("the comparison is of an earlier version without sizes; compare again")
    lines = [line for line in found.lines() if line.bits == 16]
    figure = new_figure(4.6)
    axes = figure.subplots()
    dense = found.sizes["dense"] / 1e6
    shown = []
    for best in _best_of_families(lines):
        points = [
            ((found.sizes["dense"] - line.rate * found.sizes["experts"]) / 1e6, line.added)
            for line in lines if line.rule == best.rule
        ]  # fmt: skip
        shown += [added for _, added in points]
        axes.plot(*zip((dense, 0.0), *points, strict=True), "o-", color=_colour(best.family),
                  markersize=5, label=f"{best.family or 'other'}: {best.rule}")  # fmt: skip
    plain(axes)
    axes.axhline(0, color=GREY, linewidth=0.8)
    limit_height(axes, shown)
    axes.set(xlabel="size of the model in 16 bit, MB", ylabel="nats per token added")
    axes.set_title("Size against loss, best rule of each family", loc="left")
    axes.legend(frameon=False, loc="upper right")
    return figure


def _best_of_families(lines: Sequence[Line]) -> list[Line]:
    """The rule of each family with the least loss at the highest rate it is measured at."""
    best: dict[str, Line] = {}
    for line in sorted(lines, key=lambda line: (-line.rate, line.added)):
        best.setdefault(line.family, line)
    return list(best.values())


def plot_ranking(found: Comparison, rate: float) -> "Figure":
    """One dot per rule at one rate, best on top, with the spread over seeds."""
    lines = [line for line in found.lines() if line.rate == rate]
    figure = new_figure(1.2 + 0.19 * len(lines))
    axes = figure.subplots()
    colours = [_colour(line.family) for line in lines]
    added = [line.added for line in lines]
    places = range(len(lines))
    axes.hlines(places, 0, added, color=colours, linewidth=0.8, alpha=0.4)
    spreads = [line.spread or math.nan for line in lines]  # one seed has no bar
    axes.errorbar(added, places, xerr=spreads, fmt="none", ecolor="#222222", capsize=3, linewidth=1)
    axes.scatter(added, places, color=colours, s=24, zorder=3)
    axes.set_yticks(places, [line.rule for line in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    plain(axes, grid="x")
    axes.set(xlabel="nats per token added")
    axes.set_title(f"Ranking at prune rate {rate:.4g}", loc="left")
    return figure


def _colour(family: str) -> str:
    return FAMILY_COLOURS.get(family, OTHER)


def _refused(found: Comparison) -> TextTable:
    rows = [[r.name, r.place, r.reason] for r in found.refused]
    return TextTable("Rules that cannot keep the budget", ["rule", "rate or size", "why"], rows)
