"""An audit as a page and as tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from pruning.kit.words import percent
from pruning.measure.tokens import TokenView
from pruning.report.audit_figures import (
    plot_expert_norms,
    plot_layers_alone,
    plot_loss_curves,
    plot_misalign,
    plot_router_entropy,
    typical_experts,
)
from pruning.report.drawing import figure_html
from pruning.report.html import document, section_html, text_html
from pruning.report.table import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "audit.html"  # the last file that an audit writes
# The paper's figure 2: what people rank experts by, and the attribution.
SHOWN = {"router": "router weight", "usage": "token usage", "ala": "attribution (ala)"}
PREDICTORS = {
    "gini": "Gini of its score", "fraction_holding": "channels that hold 90% of its score",
    "score_removed": "score removed",
}  # fmt: skip
ALONE = (
    "Each point is a layer, by its number: the loss that is added when it alone is pruned, against "
    "how its channels share the score. If concentration spares a layer, points fall from left to "
    "right on the left and rise on the right."
)
NOTE = (
    "Spearman rank correlation with the measured loss increase, over the whole sample and as the "
    "mean of those inside each layer. 1 is a perfect ranking, 0 is chance; a dash is a score that "
    "does not vary or a sample that is too small."
)


def audit_page(report: dict, figures: Iterable[tuple["Figure", str]] = ()) -> str:
    """The whole page, which loads nothing from anywhere.

    Args:
      report: what `audit_report` found, with its provenance.
      figures: more of them with captions, shown after the tables.
    """
    experts, channels = report["experts"], report["channels"]
    parts = [
        text_html("Audit of the scores", "h1"),
        text_html(
            f"{experts['count']} experts and {channels['count']} channels were taken out of the "
            f"model one at a time; without any removal its loss on {report['predicted']:,} "
            f"predicted tokens is {report['dense_nll']:.4f} nats per token."
        ),
    ]
    if experts["count"]:
        rows = experts["rows"]
        panels = [
            (label, np.array([row[name] for row in rows]),
             experts["proxies"][name]["masked"]["global"])
            for name, label in SHOWN.items()
        ]  # fmt: skip
        increase = np.array([row["masked"] for row in rows])
        caption = (
            "Each bar is an expert; its height is the loss increase when the expert's output is "
            "zeroed. A good score makes the bars fall from left to right, as its line does "
            "(largest score = 100%). Orange: the loss is lower without the expert."
        )
        parts += [figure_html(plot_misalign(panels, increase), caption), _harm(experts)]
    parts += map(section_html, audit_tables(report))
    if "layers" in report:
        parts.append(figure_html(plot_layers_alone(report["layers"]), ALONE))
    shown = [figure_html(*figure) for figure in figures]
    if shown:
        parts += [text_html("What routers and experts do", "h2"), *shown]
    return document("Audit of the scores", parts)


def token_figures(
    curves: tuple[np.ndarray, np.ndarray],
    seen: Mapping[str, TokenView],
    usage: np.ndarray,
    layer_indices: Sequence[int],
    criterion: str,
) -> list[tuple["Figure", str]]:
    """Figures with captions of what single tokens show.

    Args:
      curves: prune rates [K] and losses [L, E, K].
      seen: text -> values of its tokens.
      usage: [L, E] tokens routed to each expert, which decides the experts shown.
      layer_indices: the model's layer number of each of the L.
      criterion: by which channels went.
    """
    two = {name: view.entropy for name, view in list(seen.items())[:2]}
    norms = {name: view.norms for name, view in seen.items()}
    return [
        (plot_loss_curves(*curves, layer_indices),
         "One line per expert: the error of its layer's output when that expert alone loses "
         f"channels, the least by {criterion} first; nothing else changes. Note the logarithm. A "
         "line that stays low for long is an expert with many channels to spare."),
        (plot_router_entropy(two, layer_indices, usage.shape[1]),
         "How a router spreads its probability over the experts for single tokens. Near the dashed "
         "line it has no preference; near 0 one expert gets all. Dots are medians."),
        (plot_expert_norms(norms, layer_indices, typical_experts(usage)),
         "How large an expert's outputs are on different texts, before routing weights, for the "
         "tokens routed to it. An expert whose violins differ between texts is judged by the "
         "calibration text it gets. Dots are medians."),
    ]  # fmt: skip


def audit_tables(report: dict) -> list[TextTable]:
    """Rank correlations of expert and channel scores, best first."""
    found = []
    for kind, columns in (("experts", ("masked", "rerouted")), ("channels", ("masked",))):
        part = report[kind]
        if not part["count"]:
            continue
        header = ["score", *(f"{c}, {w}" for c in columns for w in ("model", "in layers"))]
        order = sorted(
            part["proxies"].items(),
            key=lambda item: -np.nan_to_num(item[1]["masked"]["global"] or -2.0),
        )
        rows = [
            [name, *(_number(one[c][w]) for c in columns for w in ("global", "within_layer"))]
            for name, one in order
        ]
        missing = ", ".join(part["not_collected"])
        note = f"{NOTE} Not collected: {missing}." if missing else NOTE
        found.append(TextTable(f"Scores of {kind}", header, rows, note))
    return [*found, *(_layer_tables(report["layers"]) if "layers" in report else ())]


def _layer_tables(layers: dict) -> list[TextTable]:
    """Each layer pruned alone, and what its concentration foretells of that."""
    rows = [
        [str(row["layer"]), f"{row['gini']:.3f}", percent(row["fraction_holding"]),
         percent(row["score_removed"]), f"{row['masked']:.4f}"]
        for row in layers["rows"]
    ]  # fmt: skip
    rate, criterion = percent(layers["rate"], 0), layers["criterion"]
    note = (
        f"Each layer without the {rate} of its channels that score least by {criterion}, whichever "
        "expert has them, the other layers whole. Gini: 0 where all channels score alike, near 1 "
        "where one has all."
    )
    header = ["layer", "Gini", "hold 90%", "score removed", "+nats"]
    found = [[PREDICTORS[name], *(_number(one[kind]) for kind in ("spearman", "pearson"))]
             for name, one in layers["correlations"].items()]  # fmt: skip
    told = (
        f"Correlation with the loss added, over {len(rows)} layers; of fewer than some ten it says "
        "little. If concentration spares a layer, it is negative for Gini and positive for the "
        "other two."
    )
    return [
        TextTable("Each layer pruned alone", header, rows, note),
        TextTable("What concentration foretells", ["of a layer", "by rank", "linear"], found, told),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _harm(experts: dict) -> Markup:
    both = experts["masked_and_rerouted"]["global"]
    return text_html(
        f"Harmful experts, without which the loss is lower: "
        f"{experts['harmful_masked']:.0%} when their output is zeroed, "
        f"{experts['harmful_rerouted']:.0%} when their tokens go to other experts. The two "
        f"measurements rank the experts alike with Spearman {_number(both)}."
    )
