"""Throughput by alignment block: its values, table and figure (the paper's figure 10)."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruning.kit.words import percent
from pruning.report.drawing import COLOURS, GREY, new_figure, plain
from pruning.report.table import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "Tokens per second through one layer of the model with its experts pruned by the paper's rule, "
    "by the block of channels that widths are multiples of; a bar spans the middle half of the "
    "runs. The dashed line is the layer as it was. On another machine the curve is another one."
)


@dataclass(frozen=True)
class Speed:
    """Throughput of one layer.

    Attributes:
      rate: prune rate of the plan; 0 for the dense layer.
      block: channels that widths are multiples of; 0 for the dense layer.
      tokens_per_second: median of the runs.
      spread: half of the distance between their quartiles.
      kept: share of the layer's channels.
    """

    rate: float
    block: int
    tokens_per_second: float
    spread: float
    kept: float


@dataclass(frozen=True)
class Speeds:
    """Throughput of one layer by rate and block, the dense layer first.

    Attributes:
      speeds: as measured.
      layer: which.
      tokens: at once.
      dtype: of the activations.
      device, jax, date: where and when.
    """

    speeds: tuple[Speed, ...]
    layer: int
    tokens: int
    dtype: str
    device: str
    jax: str
    date: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def of_rate(self, rate: float) -> list[Speed]:
        """Those of one rate, by rising blocks."""
        return sorted((one for one in self.speeds if one.rate == rate), key=lambda x: x.block)

    @property
    def rates(self) -> list[float]:
        """Prune rates, rising, that of the dense layer left out."""
        return sorted({one.rate for one in self.speeds if one.block})


def speed_table(found: Speeds) -> TextTable:
    """A row for each block, the dense layer first."""
    dense = found.of_rate(0.0)[0].tokens_per_second
    rows = [
        [
            "dense" if not one.block else percent(one.rate), str(one.block or ""),
            f"{one.tokens_per_second:,.0f} ± {one.spread:,.0f}",
            f"{one.tokens_per_second / dense:.2f}", percent(one.kept),
        ]
        for rate in (0.0, *found.rates) for one in found.of_rate(rate)
    ]  # fmt: skip
    note = (
        f"Layer {found.layer}, {found.tokens:,} tokens at once, {found.dtype}; {found.device}, jax "
        f"{found.jax}, {found.date}. Median of the runs ± half of the distance between their "
        "quartiles; kept: share of this layer's channels, which the plan decides."
    )
    header = ["pruned", "block", "tokens per second", "of dense", "kept"]
    return TextTable("Throughput by alignment block", header, rows, note)


def plot_speed(found: Speeds) -> "Figure":
    """Tokens per second over the block, a line for each rate (figure 10)."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    for rate, colour in zip(found.rates, COLOURS * len(found.rates), strict=False):
        own = found.of_rate(rate)
        axes.errorbar(
            [one.block for one in own], [one.tokens_per_second for one in own],
            yerr=[one.spread for one in own], fmt="o-", color=colour, markersize=4, capsize=3,
            elinewidth=0.8, label=f"{percent(rate, 0)} removed",
        )  # fmt: skip
    dense = found.of_rate(0.0)[0]
    axes.axhline(dense.tokens_per_second, color=GREY, linewidth=0.8, linestyle="--", label="dense")
    axes.set_xscale("log", base=2)
    blocks = sorted({one.block for one in found.speeds if one.block})
    axes.set_xticks(blocks, [str(block) for block in blocks])
    axes.minorticks_off()
    plain(axes)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="channels that widths are multiples of", ylabel="tokens per second")
    axes.set_title("Throughput against alignment", loc="left")
    axes.legend(frameon=False, loc="lower right")
    return figure
