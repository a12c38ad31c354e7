"""A comparison by what a token reads: fewer experts for each, fewer channels, fewer bits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pruning.kit.words import megabytes, percent
from pruning.report.compared import Line, bits_word
from pruning.report.comparison import Comparison
from pruning.report.comparison_sizes import COLOURS, FRONT, front
from pruning.report.drawing import GREY, limit_height, new_figure, plain
from pruning.report.table import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Bytes of weights that a token reads on average against the loss. Rings are rules, which leave "
    "a smaller folder, and the whole model; filled points are the whole model whose tokens go to "
    "fewer experts: to K (top), or without those that weigh less than a share X of the best one "
    "(skip). Further left is less to read, lower is better."
)


def compute_tables(found: Comparison) -> list[TextTable]:
    """All rows by what a token reads, where fewer experts per token were asked for."""
    if not (fewer := found.fewer()):
        return []
    # A folder of an earlier version does not say what a token reads.
    lines = [*fewer, *(line for line in found.points() if line.active_bytes)]
    ahead = front(lines, _read)
    rows = [
        [
            line.rule, bits_word(line.bits), percent(line.rate), _count(line.parameters),
            megabytes(line.bytes), _count(line.active), megabytes(line.active_bytes),
            f"{line.added:.4f}" + (f" ±{line.spread:.3f}" if line.spread else ""),
            f"{line.kl:.4f}", percent(line.top1), FRONT * any(line is one for one in ahead),
        ]
        for line in sorted(lines, key=lambda line: (line.active_bytes, line.added))
    ]  # fmt: skip
    header = ["rule", "bits", "pruned", "M", "MB", "M met", "MB met", "+nats", "KL", "top-1", ""]
    note = (
        "M: millions of weights, and MB as they would be written; met: by a token on average, "
        "without its row of the embedding: of rules as the calibration text was routed, of top-K, "
        "skip-X and merged experts as the evaluation texts were. front: nothing that was measured "
        f"reads as little and loses less. {found.of_copies}"
    )
    return [TextTable("By what a token reads, least first", header, rows, note.rstrip())]


def plot_compute(found: Comparison) -> "Figure":
    """Added nats against bytes of weights that a token reads."""
    figure = new_figure(4.6)
    axes = figure.subplots()
    others = [line for line in found.points() if line.active_bytes]
    for bits in reversed(found.bits):
        colour = COLOURS.get(bits, GREY)
        rules = [line for line in others if line.bits == bits]
        axes.scatter(*_places(rules), s=24, facecolors="none", edgecolors=colour, linewidths=0.9,
                     label=f"rules, {bits_word(bits)} bits")  # fmt: skip
        own = sorted((line for line in found.fewer() if line.bits == bits), key=_read)
        whole = [line for line in rules if not line.rate]
        for kind, style, side in (("top", "-", "right"), ("skip", "--", "left")):
            lines = [line for line in own if line.rule.startswith(kind)]
            if not lines:
                continue
            axes.plot(*_places([*lines, *whole]), style, marker="o", color=colour, markersize=5,
                      linewidth=1.4, label=f"{kind}, {bits} bits")  # fmt: skip
            for line in lines:
                axes.annotate(
                    line.rule.partition(" ")[0], (line.active_bytes / 1e6, line.added),
                    xytext=(-6 if side == "right" else 5, -9), textcoords="offset points",
                    fontsize=8, ha=side,
                )  # fmt: skip
    plain(axes)
    axes.axhline(0, color=GREY, linewidth=0.8)
    limit_height(axes, [line.added for line in (*others, *found.fewer())])
    axes.margins(x=0.1)
    axes.set(xlabel="weights that a token reads, MB", ylabel="nats per token added")
    axes.set_title("Loss against what a token reads", loc="left")
    axes.legend(frameon=False)
    return figure


def _read(line: Line) -> float:
    return line.active_bytes


def _count(weights: float) -> str:
    return f"{weights / 1e6:,.2f}"


def _places(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    return [line.active_bytes / 1e6 for line in lines], [line.added for line in lines]
