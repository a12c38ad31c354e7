"""The paper's figures as functions of arrays."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pruning.budget.importance import smooth_layer_loss
from pruning.report.drawing import (
    BLUE,
    COLOURS,
    GOLD,
    GREY,
    RED,
    colours_of,
    layer_colours,
    new_figure,
    percent_format,
    plain,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# (block, least width of a kept expert) -> a measured value.
Grid = Mapping[tuple[int, int], float]
# The paper's; other powers lie between these.
SHOWN_SMOOTHINGS = {
    "sqrt": "root", "log5": "log(1 + 5x)", "log20": "log(1 + 20x)", "clip": "clip 0.5 sd",
    "huber": "Huber tail",
}  # fmt: skip


def concentration(channel: np.ndarray, points: int = 33) -> tuple[np.ndarray, np.ndarray]:
    """How much of an expert's score its best channels hold.

    Args:
      channel: scores [L, E, F], non-negative.
      points: where the curves are sampled.

    Returns:
      (fractions of the channels [K], cumulative share of the score [L, E, K]); an expert without
      score gets the diagonal.
    """
    layers, experts, channels = channel.shape
    fractions = np.linspace(0, 1, points)
    best = -np.sort(-np.asarray(channel, np.float64), axis=2)
    total = best.sum(axis=2, keepdims=True)
    even = np.arange(1, channels + 1) / channels
    share = np.where(total > 0, np.cumsum(best, axis=2) / np.where(total > 0, total, 1), even)
    share = np.concatenate([np.zeros((layers, experts, 1)), share], axis=2)
    return fractions, share[:, :, np.rint(fractions * channels).astype(int)]


def plot_widths(
    counts: np.ndarray, layer_indices: Sequence[int], d_expert: int
) -> "Figure":  # counts [L, E]
    """Channels kept by every expert, experts sorted by width within a layer."""
    counts = -np.sort(-np.asarray(counts), axis=1)
    figure = new_figure(1.4 + min(3.6, 0.3 * len(counts)))
    axes = figure.subplots()
    image = axes.imshow(
        counts / d_expert, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest"
    )
    step = max(1, len(counts) // 16)
    axes.set_yticks(range(0, len(counts), step), [str(i) for i in list(layer_indices)[::step]])
    whole_ticks(axes)
    axes.set(xlabel="expert, widest first", ylabel="layer")
    axes.set_title("Width of every expert", loc="left")
    figure.colorbar(image, label="channels kept", format=percent_format(), pad=0.02)
    return figure


def plot_layers(
    raw: Sequence[float],
    smoothed: Sequence[float],
    coverage: Sequence[float],
    kept: Sequence[float],
    layer_indices: Sequence[int],
) -> "Figure":
    """Per layer: loss before and after smoothing, coverage, share of channels kept (figure 11)."""
    figure = new_figure(6)
    loss, cover, keep = figure.subplots(3, 1, sharex=True)
    mean = np.asarray(raw) / max(np.mean(raw), 1e-300)
    loss.plot(layer_indices, mean, "o-", color=GREY, label="measured")
    loss.plot(layer_indices, smoothed, "o-", color=BLUE, label="smoothed")
    loss.set(ylabel="layer loss\n(mean = 1)", ylim=(0, 1.15 * max(1, mean.max(), *smoothed)))
    loss.set_title("Layers", loc="left")
    loss.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    cover.plot(layer_indices, coverage, "o-", color=BLUE)
    cover.set(ylabel="score\ncovered", ylim=(0, 1.05))
    keep.bar(layer_indices, kept, color=BLUE)
    keep.set(ylabel="channels\nkept", xlabel="layer", ylim=(0, 1.05))
    whole_ticks(keep)
    for axes, percent in ((loss, ""), (cover, "y"), (keep, "y")):
        plain(axes, percent)
    return figure


def plot_smoothing(
    raw: np.ndarray, layer_indices: Sequence[int], used: str | None = None
) -> "Figure":  # [L]
    """Layer losses and what each smoothing makes of them (figure 12).

    Args:
      raw: loss of each layer, of any unit.
      layer_indices: the model's layer number of each.
      used: a name of `SMOOTHINGS` to draw thicker.
    """
    figure = new_figure(4)
    axes = figure.subplots()
    measured = smooth_layer_loss(raw, "identity", passes=0)
    axes.plot(layer_indices, measured, "o--", color=GREY, markersize=4, label="measured")
    for (name, label), colour in zip(SHOWN_SMOOTHINGS.items(), COLOURS, strict=True):
        axes.plot(
            layer_indices, smooth_layer_loss(raw, name), "o-", color=colour, markersize=4,
            label=label, linewidth=2.6 if name == used else 1.2, zorder=3 if name == used else 2,
        )  # fmt: skip
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set(xlabel="layer", ylabel="layer loss (mean = 1)", ylim=(0, None))
    whole_ticks(axes)
    axes.set_title("Smoothings of the layer loss", loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=6)
    plain(axes)
    return figure


def plot_routers(
    entropy: np.ndarray, usage: np.ndarray, layer_indices: Sequence[int]
) -> "Figure":  # [L], [L, E]
    """Per layer: mean entropy of the router, and how evenly it uses its experts.

    Args:
      entropy: mean over tokens, nats.
      usage: share of the layer's routed tokens that each expert gets; rows sum to 1.
      layer_indices: the model's layer number of each row.
    """
    experts = np.shape(usage)[1]
    figure = new_figure(4.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.plot(layer_indices, entropy, "o-", color=BLUE)
    top.axhline(np.log(experts), color=GREY, linestyle="--", linewidth=1.2,
                label=f"no preference: ln {experts} = {np.log(experts):.2f}")  # fmt: skip
    top.set(ylabel="router entropy,\nnats", ylim=(0, 1.1 * np.log(max(experts, 2))))
    top.set_title("Routers", loc="left")
    marks = {"color": BLUE, "markersize": min(12, 400 / len(layer_indices)), "alpha": 0.6}
    for layer, row in zip(layer_indices, np.asarray(usage), strict=True):
        bottom.plot([layer] * experts, row, "_", **marks)
    bottom.axhline(1 / experts, color=GREY, linestyle="--", linewidth=1.2)
    bottom.set(xlabel="layer", ylabel="share of the\nrouted tokens", ylim=(0, None))
    whole_ticks(bottom)
    top.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    plain(top)
    plain(bottom, "y")
    return figure


def plot_rounding(nearest: Sequence[float], gptq: Sequence[float]) -> "Figure":
    """Output error of every layer in 4 bits, by rounding to nearest and by GPTQ.

    Args:
      nearest, gptq: squared error relative to what the layer adds to its input.
    """
    figure = new_figure(3.2)
    axes = figure.subplots()
    layer = np.arange(len(nearest))
    axes.plot(layer, nearest, "o-", color=GREY, markersize=4, label="rounded to nearest")
    axes.plot(layer, gptq, "o-", color=BLUE, markersize=4, label="GPTQ")
    axes.set(xlabel="layer", ylabel="squared output error,\nrelative", ylim=(0, None))
    whole_ticks(axes)
    axes.set_title("Rounding to 4 bits", loc="left")
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    plain(axes, "y")
    return figure


def plot_concentration(
    fractions: np.ndarray, curves: np.ndarray, layer_indices: Sequence[int]
) -> "Figure":  # [K], [L, E, K]
    """Cumulative score against the share of channels, one line per expert (figure 4a)."""
    figure = new_figure(4.2)
    axes = figure.subplots()
    colours, labelled = layer_colours(len(curves))
    for colour, layer in zip(colours, curves, strict=True):
        axes.plot(fractions, np.asarray(layer).T, color=colour, linewidth=0.7, alpha=0.6)
    axes.plot([0, 1], [0, 1], ":", color=GREY, label="all channels alike")
    for slot in labelled:
        axes.plot([], [], color=colours[slot], label=f"layer {layer_indices[slot]}")
    axes.set(
        xlabel="share of an expert's channels, best first",
        ylabel="share of the channel score they hold",
        xlim=(0, 1),
        ylim=(0, 1.02),
    )
    axes.set_title("Concentration of the channel scores", loc="left")
    axes.legend(frameon=False, loc="lower right")
    plain(axes, "xy")
    return figure


def plot_stability(
    tokens: Sequence[int],
    jaccard: Sequence[float],
    halves: float | None,
    *,
    share: float,
    wanted: float | None = None,
) -> "Figure":
    """Overlap of the kept set with the one before each part of the text, and of two halves.

    Args:
      tokens: scored up to and with each part but the first.
      jaccard: overlap at each of them, in [0, 1].
      halves: overlap of the sets that the two halves of the text choose.
      share: of the channels that is kept, for the overlap that chance gives.
      wanted: overlap at which scoring was to stop.
    """
    figure = new_figure(3.6)
    axes = figure.subplots()
    axes.plot(tokens, jaccard, "o-", color=BLUE, label="before and after each part")
    # Random sets of a share p have p * p in both, 2 p - p * p in either.
    lines = [(share / (2.0 - share), GREY, "random sets"), (halves, RED, "halves of the text"),
             (wanted, GOLD, "enough to stop")]  # fmt: skip
    for value, colour, label in lines:
        if value is not None:
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=label)
    axes.set_ylim(top=1.02)
    axes.set_xlim(0, 1.05 * max(tokens))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="calibration tokens scored", ylabel="overlap of the kept sets\n(Jaccard index)")
    axes.set_title("Stability of the kept channels", loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    plain(axes, "y")
    return figure


def plot_expert_bars(
    curves: np.ndarray, counts: np.ndarray, attribution: np.ndarray, layer: int, d_expert: int
) -> "Figure":  # [E, K], [E], [E]
    """Experts of one layer: score by tenths of channels, channels kept, attribution (figure 15)."""
    figure = new_figure(4)
    axes = figure.subplots()
    experts = np.arange(len(curves))
    order = np.argsort(-np.asarray(attribution), kind="stable")
    tenths = np.rint(np.linspace(0, np.shape(curves)[1] - 1, 11)).astype(int)
    steps = np.diff(np.asarray(curves)[order][:, tenths], axis=1)
    colours, bottom = colours_of("Blues", np.linspace(0.85, 0.15, 10)), np.zeros(len(curves))
    for number, (step, colour) in enumerate(zip(steps.T, colours, strict=True)):
        label = "score of each tenth of the channels" if number == 0 else None
        axes.bar(experts, step, bottom=bottom, color=colour, width=0.9, label=label)
        bottom += step
    kept = np.asarray(counts)[order] / d_expert
    axes.plot(experts, kept, color=RED, drawstyle="steps-mid", label="channels kept")
    scaled = np.asarray(attribution)[order] / max(np.max(attribution), 1e-300)
    axes.plot(experts, scaled, "D", color=GOLD, markersize=4, label="attribution (largest = 100%)")
    step = -(-len(experts) // 32)
    axes.set_xticks(experts[::step], [str(i) for i in order[::step]])
    axes.set(
        xlabel="expert, most important first",
        ylabel="share of the expert's score",
        xlim=(-0.7, len(experts) - 0.3),
        ylim=(0, 1.05),
    )
    axes.set_title(f"Experts of layer {layer}", loc="left")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    plain(axes, "y")
    return figure


def plot_alignment(panels: Mapping[str, Grid]) -> "Figure":
    """Values against the least width, one line per block (figure 10).

    Args:
      panels: name with unit, for example "tokens per second" -> the values of each pair of block
        and least width. Pairs may be missing: a least width is at least one block.

    Returns:
      Two panels a row.
    """
    rows = -(-len(panels) // 2)
    figure = new_figure(0.6 + 2.5 * rows)
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
