"""A comparison by bytes: fewer bits, fewer channels and both, in tables and against the loss."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pruning.kit.words import megabytes, percent
from pruning.report.compared import AUTO, Line, bits_word
from pruning.report.comparison import Comparison
from pruning.report.drawing import BLUE, GOLD, GREEN, GREY, RED, limit_height, new_figure, plain
from pruning.report.table import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {16: BLUE, 8: GOLD, 4: RED, AUTO: GREEN}  # by bits
FRONT = "front"
ALIKE = 1.002  # names of emptied experts are not in the header, which is no gain
CAPTION = (
    "Bytes of the folder that each plan would be written as, weights alone, against the loss. "
    "Further left is smaller, lower is better. A line joins what loses least in its bits at each "
    "size; rings are rounding alone, with nothing removed, and the square is the model as it was. "
    "Dashed lines are the sizes that were asked for. Weights in fewer bits are rounded to nearest."
)


def size_tables(found: Comparison) -> list[TextTable]:
    """What loses least at each size that was asked for, and all rules and bits by their bytes."""
    lines = found.points()
    shown = {}
    for target in found.targets:
        own = [line for line in lines if line.target == target]
        title = f"At {megabytes(target)} MB, least loss first"
        shown[title] = sorted(own, key=lambda line: line.added)
    others = [line for line in lines if not line.target]
    if len(found.bits) > 1 and others:
        ordered = sorted(others, key=lambda line: (line.bytes, line.added))
        shown["By bytes written, smallest first"] = ordered
    ahead = front(lines)
    tables = (_table(title, own, ahead, found.of_copies) for title, own in shown.items())
    return [*tables, *_layer_tables(found)]


def plot_sizes(found: Comparison) -> "Figure":
    """Added nats against bytes, a line of the best for each number of bits."""
    lines = found.points()
    figure = new_figure(4.6)
    axes = figure.subplots()
    for bits in reversed(found.bits):
        own, colour = [line for line in lines if line.bits == bits], COLOURS.get(bits, GREY)
        axes.scatter(*_places(own), s=9, color=colour, alpha=0.35, linewidths=0)
        alone = [line for line in own if line.rate == 0]
        axes.scatter(*_places(alone), s=60, facecolors="none", edgecolors=colour, linewidths=1.6)
        dense = [(found.sizes["dense"] / 1e6, 0.0)] if bits == 16 and found.sizes else []
        best = [*zip(*_places(front(own)), strict=True), *dense]
        if best:
            axes.plot(*zip(*best, strict=True), "o-", color=colour, markersize=4,
                      label=f"{bits_word(bits)} bits")  # fmt: skip
    if found.sizes:
        axes.plot([found.sizes["dense"] / 1e6], [0.0], "s", color=GREY, markersize=6)
    for target in found.targets:
        axes.axvline(target / 1e6, color=GREY, linewidth=0.8, linestyle="--")
    plain(axes)
    limit_height(axes, [line.added for line in lines])
    axes.set(xlabel="weights as written, MB", ylabel="nats per token added")
    axes.set_title("Loss against bytes: fewer bits, fewer channels, both", loc="left")
    axes.legend(frameon=False)
    return figure


def _layer_tables(found: Comparison) -> list[TextTable]:
    """What was chosen for each layer, where layers have bits of their own."""
    rows = [
        [one.name, one.place, " ".join(map(str, one.layer_bits)),
         " ".join(f"{100 * share:.0f}" for share in one.layer_shares)]
        for one in found.results if one.layer_bits
    ]  # fmt: skip
    note = (
        "Bits of a layer's linear layers and the share of its experts' channels that is kept, in "
        "percent, from the first layer up. The embedding and the head stay in 16 bits. "
        "`moe-compress apply` writes such a plan, which is in the folder auto beside this page."
    )
    header = ["rule", "at", "bits", "kept"]
    return [TextTable("Channels and bits of each layer", header, rows, note)] if rows else []


def _written(line: Line) -> float:
    return line.bytes


def front(lines: Sequence[Line], size: Callable[[Line], float] = _written) -> list[Line]:
    """Those of which no other is as small, to `ALIKE`, and loses less; smallest first."""

    def is_behind(line: Line) -> bool:
        return any(x.added < line.added and size(x) <= ALIKE * size(line) for x in lines)

    return sorted((x for x in lines if not is_behind(x)), key=size)


def _places(lines: Sequence[Line]) -> tuple[list[float], list[float]]:
    return [line.bytes / 1e6 for line in lines], [line.added for line in lines]


def _table(title: str, lines: Sequence[Line], ahead: Sequence[Line], more: str) -> TextTable:
    marks = [FRONT if any(line is one for one in ahead) else "" for line in lines]
    rows = [
        [
            line.rule, bits_word(line.bits), percent(line.rate), megabytes(line.bytes),
            megabytes(line.active_bytes) if line.active_bytes else "-",
            f"{line.added:.4f}" + (f" ±{line.spread:.3f}" if line.spread else ""),
            f"{line.kl:.4f}", percent(line.top1), mark,
        ]
        for line, mark in zip(lines, marks, strict=True)
    ]  # fmt: skip
    header = ["rule", "bits", "pruned", "MB", "MB met", "+nats", "KL", "top-1", ""]
    note = (
        "MB: weights as they would be written, one width per expert where the family has that; "
        "met: by a token on average, without its row of the embedding. Fewer bits are rounded to "
        f"nearest. front: nothing that was measured is as small and loses less. {more}"
    )
    return TextTable(title, header, rows, note.rstrip())
