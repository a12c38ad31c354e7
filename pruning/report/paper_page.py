"""The paper's tables as one self-contained page, with its figures 9 and 10."""

import math
from typing import TYPE_CHECKING

from pruning.report.compared import UNPRUNED, Result
from pruning.report.comparison_tasks import answers_of
from pruning.report.drawing import (
    BLUE,
    COLOURS,
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
from pruning.report.html import document, section_html, text_html
from pruning.report.paper import Method, Paper

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAGE = "paper.html"  # the last file that a run writes
FIXED = {"the paper's rule": BLUE, "ours": RED, "ours, not repaired": ORANGE,
         "best expert removal": GREEN, "uniform widths": PURPLE}  # fmt: skip
JUDGED = (
    "Figure 9: mean share of right answers over tasks against the share of expert channels that is "
    "gone; higher is better. Solid in the most bits, dashed in fewer; a bar is one standard error "
    "of the difference from the dense model over the same questions."
)
LOST = (
    "Figure 9, without tasks: nats per token that a plan adds against the share of expert channels "
    "that is gone; lower is better. Solid in the most bits, dashed in fewer."
)
TIMED = (
    "Figure 10: left, tokens per second through the experts of one layer of the paper's rule when "
    "all their widths are multiples of a block, a bar from the first to the third quartile, dashed "
    "the dense layer; right, what these experts take in memory. A larger block chooses more "
    "coarsely; the loss in figure 9 is at the block of the exports."
)


def paper_page(found: Paper) -> str:
    """The whole page, which loads nothing from anywhere."""
    caption = JUDGED if found.is_judged else LOST
    parts = [
        text_html(found.title, "h1"),
        text_html(found.head),
        figure_html(plot_rates(found), caption),
        *([figure_html(plot_blocks(found), TIMED)] if found.timed else []),
        *map(section_html, found.tables()),
    ]
    return document(found.title, parts)


def plot_rates(found: Paper) -> "Figure":
    """Accuracy, or added loss, over rate; a panel without recovery and one with it."""
    figure, halves = new_figure(4.6), found.halves()
    panels = figure.subplots(1, len(halves), sharey=True, squeeze=False)[0]
    shown: list[float] = []
    for axes, (title, half) in zip(panels, halves, strict=True):
        lines = [one for _, one in found.lines(half)]
        for number, method in enumerate(found.methods):
            for bits in sorted({one.bits for one in lines}, reverse=True):
                own = [one for one in lines if one.bits == bits and _is_of(one, method)]
                label = method.label if bits == max(one.bits for one in lines) else ""
                shown += _draw(axes, found, own, bits, _colour(method, number), label)
        plain(axes, "x")
        axes.set(xlabel="expert channels removed")
        axes.set_title(title.partition(":")[0], loc="left")
    panels[0].set_ylabel(
        "right answers, %, mean over tasks" if found.is_judged else "nats per token added"
    )
    if found.is_judged:
        _level(panels, 100 * _whole(found))
    else:
        limit_height(panels[0], shown)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _is_of(result: Result, method: Method) -> bool:
    return (result.rule, result.repair) == (method.rule, method.repair)


def _draw(
    axes: "Axes", found: Paper, own: list[Result], bits: int, colour: str, label: str
) -> list[float]:
    """One method in one number of bits, the most with a label; the heights of its points."""
    points = [point for one in own if (point := _point(found, one)) is not None]
    if not points:
        return []
    begin = _begin(found, bits)
    rates, heights, errors = zip(*([begin] if begin else []), *points, strict=True)
    axes.errorbar(
        rates, heights, yerr=errors, marker="o", markersize=4, capsize=2, color=colour,
        linestyle="-" if label else "--", linewidth=1.4 if label else 1.0, label=label or None,
    )  # fmt: skip
    return list(heights)


def _point(found: Paper, one: Result) -> tuple[float, float, float] | None:
    """Rate, height and error of a result; None if it was asked no task that has a mean."""
    if not found.is_judged:
        return one.rate, found.added(one), math.nan
    answers = answers_of([one])
    if not one.tasks or math.isnan(answers.mean):
        return None
    return one.rate, 100 * answers.mean, 100 * answers.error


def _begin(found: Paper, bits: int) -> tuple[float, float, float] | None:
    """Where a line begins: the whole model in so many bits."""
    if bits == 16:
        return (0.0, 100 * _whole(found), math.nan) if found.is_judged else (0.0, 0.0, math.nan)
    own = (one for _, one in found.lines(found.pruned) if one.rule == UNPRUNED)
    return next((_point(found, one) for one in own if one.bits == bits), None)


def _whole(found: Paper) -> float:
    answers = next(answers_of([one]) for _, one in found.lines(found.pruned) if one.tasks)
    return answers.mean + answers.lost


def _level(panels: "list[Axes]", height: float) -> None:
    for axes in panels:
        axes.axhline(height, color=GREY, linewidth=0.8, linestyle=":")


def _colour(method: Method, number: int) -> str:
    return FIXED.get(method.label, COLOURS[number % len(COLOURS)])


def plot_blocks(found: Paper) -> "Figure":
    """Throughput and memory over the block that widths are multiples of."""
    figure = new_figure(3.8)
    speed, memory = figure.subplots(1, 2)
    dense, pruned = found.timed[0], found.timed[1:]
    speed.axhline(dense.tokens_per_second[0], color=GREY, linewidth=0.8, linestyle="--",
                  label="dense")  # fmt: skip
    memory.axhline(dense.bytes / 1e6, color=GREY, linewidth=0.8, linestyle="--")
    rates = sorted({one.rate for one in pruned})
    for rate, colour in zip(rates, COLOURS, strict=False):
        own = sorted((one for one in pruned if one.rate == rate), key=lambda one: one.block)
        blocks = [one.block for one in own]
        middle = [one.tokens_per_second[0] for one in own]
        bars = [
            [one.tokens_per_second[0] - one.tokens_per_second[1] for one in own],
            [one.tokens_per_second[2] - one.tokens_per_second[0] for one in own],
        ]
        speed.errorbar(blocks, middle, yerr=bars, marker="o", markersize=4, capsize=2,
                       color=colour, label=f"{rate:.0%} removed")  # fmt: skip
        memory.plot(blocks, [one.bytes / 1e6 for one in own], "o-", markersize=4, color=colour)
    for axes, title, name in (
        (speed, "Throughput", "tokens per second"), (memory, "Memory", "experts of a layer, MB"),
    ):  # fmt: skip
        blocks = sorted({one.block for one in pruned})
        axes.set_xscale("log", base=2)
        axes.set_xticks(blocks, list(map(str, blocks)))
        axes.set_ylim(bottom=0)
        plain(axes)
        axes.set(xlabel="block of channels", ylabel=name)
        axes.set_title(title, loc="left")
    speed.legend(frameon=False, loc="lower right")
    return figure
