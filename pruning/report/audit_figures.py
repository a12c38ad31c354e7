"""Figures of an audit: what experts are worth, what pruning one costs, what routers do."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from moe_jax.errors import InputError
from pruning.report.drawing import (
    BLUE,
    COLOURS,
    GREY,
    ORANGE,
    layer_colours,
    new_figure,
    patch,
    percent_format,
    plain,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Side = Literal["both", "low", "high"]  # half of a violin
DEPTHS = 12  # layers in a figure of distributions, as in the paper


def plot_misalign(
    panels: Sequence[tuple[str, np.ndarray, float | None]], increase: np.ndarray, top: int = 50
) -> "Figure":
    """What the experts that a proxy ranks highest are really worth (figure 2).

    Args:
      panels: for each proxy its name, its scores [n] and its Spearman correlation with `increase`.
      increase: [n] loss increase without the expert, nats per token.
      top: experts shown, best first.

    Returns:
      One panel for each proxy: its scores as a falling line, the increases as bars. Bars that fall
      with the line mean a good proxy, orange ones are experts without which the loss is lower.
    """
    shown = min(top, len(increase))
    figure = new_figure(0.6 + 2.1 * len(panels))
    axes = np.atleast_1d(np.asarray(figure.subplots(len(panels), 1, sharex=True, sharey=True)))
    for axis, (name, score, correlation) in zip(axes, panels, strict=True):
        order = np.argsort(-np.asarray(score), kind="stable")[:shown]
        bars = np.asarray(increase)[order]
        colours = [ORANGE if bar < 0 else BLUE for bar in bars]
        places = np.arange(1, shown + 1)
        axis.bar(places, bars, color=colours, width=0.85)
        rank = "undefined" if correlation is None else f"{correlation:.2f}"
        axis.set_title(f"ranked by {name}: Spearman {rank}", loc="left", fontsize=11)
        axis.axhline(0, color=GREY, linewidth=0.8)
        plain(axis)
        axis.set(xlim=(0.3, shown + 0.7))
        line = axis.twinx()
        scaled = np.asarray(score, float)[order] / max(np.max(np.abs(score)), 1e-300)
        line.plot(places, scaled, color="#444444", linewidth=1.2, marker=".", markersize=3)
        line.spines[["top", "left"]].set_visible(False)
        line.set(ylim=(min(0.0, 1.05 * scaled.min()), 1.05), ylabel="score\n(line)")
        line.yaxis.set_major_formatter(percent_format())
    axes[-1].set_xlabel(f"expert, best first (the top {shown} of {len(increase)})")
    figure.supylabel("loss increase without the expert, nats per token", fontsize=10)
    return figure


def plot_layers_alone(layers: Mapping[str, Any]) -> "Figure":
    """Loss of pruning each layer alone against the concentration of its score.

    Args:
      layers: what `concentration_report` found, with the `rate`.

    Returns:
      Two panels, the Gini coefficient and the fraction of channels that hold nine tenths.
    """
    figure = new_figure(3.4)
    panels = figure.subplots(1, 2, sharey=True)
    names = {"gini": "Gini of the layer's score", "fraction_holding": "channels that hold 90%"}
    rows = layers["rows"]
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        axes.scatter([row[name] for row in rows], [row["masked"] for row in rows], s=22, color=BLUE)
        for row in rows:
            axes.annotate(str(row["layer"]), (row[name], row["masked"]), xytext=(4, 3),
                          textcoords="offset points", fontsize=8)  # fmt: skip
        rank = layers["correlations"][name]["spearman"]
        told = "undefined" if rank is None else f"{rank:.2f}"
        axes.set_title(f"Spearman {told}", loc="left", fontsize=11)
        axes.set(xlabel=label)
        plain(axes, "x" * (name == "fraction_holding"))
    panels[0].set(ylabel=f"nats per token added\nwithout {layers['rate']:.0%} of the layer")
    return figure


def plot_loss_curves(
    rates: np.ndarray, losses: np.ndarray, layer_indices: Sequence[int]
) -> "Figure":  # [K], [L, E, K]
    """Loss of a layer's output against the share of one expert's channels removed (figure 4b).

    Losses span decades, hence the logarithm; an expert that no token reached has no line.
    """
    figure = new_figure(4.2)
    axes = figure.subplots()
    colours, labelled = layer_colours(len(losses))
    for colour, layer in zip(colours, losses, strict=True):
        lines = np.where(np.asarray(layer) > 0, layer, np.nan)
        axes.plot(rates, lines.T, color=colour, linewidth=0.8, alpha=0.7)
    for slot in labelled:
        axes.plot([], [], color=colours[slot], label=f"layer {layer_indices[slot]}")
    axes.set(
        xlabel="share of one expert's channels removed, worst first",
        ylabel="loss of the layer's output\n(squared error / squared norm)",
        xlim=(0, 1),
        yscale="log",
    )
    axes.set_title("What pruning a single expert costs its layer", loc="left")
    axes.legend(frameon=False, loc="lower right")
    plain(axes, "x")
    axes.yaxis.set_major_formatter(lambda loss, _: f"{100 * loss:.4g}%")
    return figure


def plot_router_entropy(
    entropies: Mapping[str, np.ndarray], layer_indices: Sequence[int], experts: int
) -> "Figure":  # text -> [L, N]
    """Entropy of the router's probabilities over tokens, by depth (figure 13).

    Args:
      entropies: of one text, or of two, which are drawn as the halves of each violin; nats.
      layer_indices: the model's layer number of each of the L rows.
      experts: per layer; a router without a preference has the entropy ln E.

    Raises:
      InputError: no text, or more than two.
    """
    if not 1 <= len(entropies) <= 2:
        raise InputError(f"{len(entropies)} texts do not fit into a violin; give one or two")
    shown = np.unique(np.linspace(0, len(layer_indices) - 1, DEPTHS).round().astype(int))
    places = np.arange(len(shown))
    figure = new_figure(4)
    axes = figure.subplots()
    sides: tuple[Side, ...] = ("both",) if len(entropies) == 1 else ("low", "high")
    handles = []
    for colour, side, (text, values) in zip(COLOURS, sides, entropies.items(), strict=False):
        _violins(axes, [np.asarray(values)[slot] for slot in shown], places, colour, 0.85, side)
        handles.append(patch(colour, text))
    ceiling = axes.axhline(np.log(experts), color=GREY, linestyle="--", linewidth=1.2)
    ceiling.set_label(f"no preference: ln {experts} = {np.log(experts):.2f}")
    axes.set_xticks(places, [str(layer_indices[slot]) for slot in shown])
    axes.set(xlabel="layer", ylabel="entropy of the router, nats", ylim=(0, None))
    axes.set_title("How undecided the routers are, token by token", loc="left")
    figure.legend(handles=[*handles, ceiling], frameon=False, loc="outside lower center", ncols=3)
    plain(axes)
    return figure


def plot_expert_norms(
    norms: Mapping[str, Sequence[Sequence[np.ndarray]]],
    layer_indices: Sequence[int],
    chosen: Mapping[int, Sequence[int]],
) -> "Figure":
    """Distributions of the norms of experts' outputs on several texts (figure 14).

    Args:
      norms: text -> [L][E] arrays of L2 norms, one of each token routed to the expert.
      layer_indices: the model's layer number of each of the L rows.
      chosen: row -> experts to draw, for example from `typical_experts`.

    Returns:
      One panel per chosen layer, one group of violins per expert; a white dot is the median.
    """
    figure = new_figure(0.7 + 2.1 * len(chosen))
    panels = np.atleast_1d(np.asarray(figure.subplots(len(chosen), 1)))
    step = 0.84 / len(norms)
    for axes, (slot, experts) in zip(panels, chosen.items(), strict=True):
        for number, (colour, values) in enumerate(
            zip(itertools.cycle(COLOURS), norms.values(), strict=False)
        ):
            places = np.arange(len(experts)) + step * (number - (len(norms) - 1) / 2)
            drawn = [np.asarray(values[slot][expert]) for expert in experts]
            _violins(axes, drawn, places, colour, 0.9 * step)
        axes.set_xticks(range(len(experts)), [f"expert {expert}" for expert in experts])
        axes.set(ylabel="L2 norm of\nthe output", ylim=(0, None), xlim=(-0.6, len(experts) - 0.4))
        axes.set_title(f"Layer {layer_indices[slot]}", loc="left", fontsize=11)
        plain(axes)
    handles = [patch(c, text) for c, text in zip(itertools.cycle(COLOURS), norms, strict=False)]
    panels[-1].set_xlabel("most, middling and least used expert of the layer")
    figure.suptitle("Sizes of the experts' outputs", x=0.01, ha="left")
    columns = len(norms) if sum(map(len, norms)) < 70 else 2
    figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=columns)
    return figure


def typical_experts(tokens: np.ndarray, layers: int = 3) -> dict[int, list[int]]:  # [L, E]
    """Three experts each of the first, the last and the layers between: the most, the median and
    the least used one, by the tokens routed to them."""
    order = np.argsort(-np.asarray(tokens), axis=1, kind="stable")
    slots = np.unique(np.linspace(0, len(order) - 1, layers).round().astype(int))
    picked = np.unique([0, order.shape[1] // 2, order.shape[1] - 1])
    return {int(slot): order[slot, picked].tolist() for slot in slots}


def _violins(
    axes: "Axes",
    values: Sequence[np.ndarray],
    places,
    colour: str,
    width: float,
    side: Side = "both",
) -> None:
    # A density needs two different values; fewer are drawn as what they are.
    for place, one in zip(places, values, strict=True):
        if len(one) > 1 and np.ptp(one) > 0:
            parts = axes.violinplot(
                one, [place], widths=width, showextrema=False, side=side, points=100
            )
            for body in cast(Iterable, parts["bodies"]):
                body.set(facecolor=colour, edgecolor=colour, alpha=0.75, linewidth=0.5)
        if len(one):
            shift = {"low": -0.12, "high": 0.12}.get(side, 0.0) * width
            axes.plot(place + shift, np.median(one), "o", color="white", markeredgecolor="#333333",
                      markeredgewidth=0.6, markersize=3.5, zorder=3)  # fmt: skip
