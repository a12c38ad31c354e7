"""A report as one self-contained page, and as a fragment for notebooks."""

import base64
import html
import io
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from pruning.report import figures as plots
from pruning.report.compression_tables import TextTable, headlines, layer_table, tables

if TYPE_CHECKING:
    from pruning.report.compression import CompressionReport

LONGEST_NAME = 32  # characters; longer cells without a space are paths
DOTS = 150  # per inch: sharp at page width, some 50 kB a figure
LAYER_LOSS = {
    "energy": "how much of the layer's output the experts make, per token",
    "attribution": "the sum of the experts' attribution",
    "nll_ig": "the loss that the layer's experts spare together, nats per token",
}
LONG = 16  # a layer table of more rows is folded


def page(report: "CompressionReport") -> str:
    """The whole page, which loads nothing from anywhere."""
    sizes, quality, allocation, verification, stages = tables(report)
    parts = [
        f"<h1>Compression report</h1>\n{_summary(report)}",
        _headlines(report),
        *map(section_html, (sizes, quality)),
        _sample(report),
        "<h2>What is kept</h2>",
        *(figure_html(figure, caption) for figure, caption in figures(report)),
        section_html(allocation),
        long_section(layer_table(report)),
        *map(section_html, (verification, stages)),
        _provenance(report),
    ]
    return document("Compression report", parts)


def document(title: str, parts: Iterable[str]) -> str:
    """A page of its own from pieces of HTML."""
    return _PAGE.replace("@TITLE@", html.escape(title)).replace("@BODY@", "\n".join(parts))


def fragment(report: "CompressionReport") -> str:
    """Headline and tables without style, for a notebook's output."""
    lines = (f"<b>{line.number} {line.unit}</b>: {_text(line.detail)}"
             for line in headlines(report))  # fmt: skip
    return f"<p>{'<br>'.join(lines)}</p>" + "\n".join(map(section_html, tables(report)))


def figures(report: "CompressionReport") -> list[tuple[Figure, str]]:
    """Figures with a caption each."""
    counts = np.asarray(report.counts)
    fractions = np.asarray(report.concentration["fractions"])
    curves = np.asarray(report.concentration["curves"])
    kept = (counts.mean(axis=1) / report.d_expert).tolist()
    middle = len(counts) // 2
    bars = plots.plot_expert_bars(
        curves[middle], counts[middle], np.asarray(report.attribution)[middle],
        report.layer_indices[middle], report.d_expert,
    )  # fmt: skip
    unread = "" if report.calibration["tokens"] else "No text was read: all layers count alike. "
    layers = plots.plot_layers(
        report.layer_loss["raw"], report.layer_loss["smoothed"], report.layer_coverage, kept,
        report.layer_indices,
    )  # fmt: skip
    return [
        (plots.plot_widths(counts, report.layer_indices, report.d_expert),
         "One row per layer, one cell per expert, widest first. Bright experts keep all their "
         "channels, the darkest keep none."),
        (layers,
         f"{unread}Top: {LAYER_LOSS[report.recipe.get('layer_loss', 'energy')]}; planners that "
         "weigh layers use the smoothed line. Middle: share of the channel score that is kept. "
         "Bottom: share of the channels that is kept."),
        (plots.plot_concentration(fractions, curves, report.layer_indices),
         "One line per expert. The more a line bends, the fewer channels hold the expert's score, "
         "and the cheaper it is to prune."),
        (bars,
         "The experts of one layer. A bar is an expert's channel score in ten steps: the darkest "
         "step is its best tenth of channels. Red: how many channels it keeps. Gold: how much the "
         "expert matters to the layer."),
        *_routers(report),
        *_smoothing(report),
        *_stability(report),
        *_rounding(report),
    ]  # fmt: skip


def _routers(report: "CompressionReport") -> list[tuple[Figure, str]]:
    """How decided and how even the routers are, if a text was read."""
    found = report.calibration
    if "router_entropy" not in found:
        return []
    figure = plots.plot_routers(
        np.asarray(found["router_entropy"]), np.asarray(found["usage"]), report.layer_indices
    )
    caption = (
        "Top: entropy of the router's probabilities, mean over tokens; at the dashed line it does "
        "not care, at 0 it is always certain. Bottom: one mark per expert, its share of the "
        "layer's tokens; at the dashed line all are used alike."
    )
    return [(figure, caption)]


def _smoothing(report: "CompressionReport") -> list[tuple[Figure, str]]:
    """What the layers' weights would be under each smoothing, if the layers differ."""
    raw, used = np.asarray(report.layer_loss["raw"]), report.recipe.get("smoothing")
    if len(raw) < 2 or np.ptp(raw) == 0:
        return []
    caption = (
        "The layer losses above, and what a planner that weighs layers makes of them under each "
        "smoothing: the flatter, the more evenly the layers are pruned."
    )
    return [(plots.plot_smoothing(raw, report.layer_indices, used), caption)]


def _stability(report: "CompressionReport") -> list[tuple[Figure, str]]:
    """How the kept set settled, if the text was scored in parts that can be compared."""
    found = report.calibration.get("stability") or {}
    known = [overlap for overlap in found.get("jaccard", ()) if overlap is not None]
    if not known:
        return []
    halves = found["halves"]
    figure = plots.plot_stability(
        found["tokens"][-len(known):], known, halves,
        share=report.sizes["channels_kept"] / report.sizes["channels"],
        wanted=report.recipe.get("until_stable"),
    )  # fmt: skip
    apart = "" if halves is None else f" (here {halves:.1%})"
    caption = (
        "Overlap of two sets of kept channels: those in both over those in either. Blue: the set "
        "before and after each further part of the text; near 100% more text changes little. Red: "
        f"the sets of the even and of the odd parts, half the text each{apart}: how well the "
        "choice repeats on other text. Grey: two random sets."
    )
    return [(figure, caption)]


def _rounding(report: "CompressionReport") -> list[tuple[Figure, str]]:
    """What GPTQ did in every layer, if it ran."""
    layers = report.quantization
    if not layers:
        return []
    figure = plots.plot_rounding(*([one[way] for one in layers] for way in ("nearest", "gptq")))
    failed, matrices = (sum(one[name] for one in layers) for name in ("fallbacks", "matrices"))
    caption = (
        "Squared error of each layer's output on held-out text, relative to what the layer adds to "
        f"its input. {failed:,} of {matrices:,} matrices saw too little text for GPTQ and were "
        "rounded to nearest."
    )
    return [(figure, caption)]


def _summary(report: "CompressionReport") -> str:
    model, sizes = report.model, report.sizes
    share = sizes["channels_kept"] / sizes["channels"]
    return (
        f"<p>{_text(model['path'])} ({_text(model['family'])}, {model['parameters'] / 1e6:,.1f} "
        f"million parameters). {sizes['channels_kept']:,} of {sizes['channels']:,} expert channels "
        f"kept ({share:.1%}).{_no_text(report)}</p>"
    )


def _no_text(report: "CompressionReport") -> str:
    if report.calibration["tokens"]:
        return ""
    criterion, attribution = (report.recipe[name] for name in ("criterion", "attribution"))
    return (
        " No calibration text was read: the weights alone decided (criterion "
        f"{_text(criterion)}, attribution {_text(attribution)}), which is a preview."
    )


def _headlines(report: "CompressionReport") -> str:
    cards = (
        f"<div><strong>{_text(line.number)}</strong> <b>{_text(line.unit)}</b>"
        f"<br><small>{_text(line.detail)}</small></div>"
        for line in headlines(report)
    )
    return f'<section class="cards">{"".join(cards)}</section>'


def section_html(table: TextTable) -> str:
    """A table under its title."""
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return f"<h2>{table.title}</h2>{_table(table)}{note}"


def long_section(table: TextTable) -> str:
    """A table under its title, folded if it is long."""
    note = f'<p class="note">{_text(table.note)}</p>'
    state = " open" if len(table.rows) <= LONG else ""
    return f"<details{state}><summary>{table.title}</summary>{_table(table)}{note}</details>"


def _cell(text: str) -> str:
    """Text of a cell; the name of a rule or a format is not broken at its hyphens."""
    is_name = "-" in text and " " not in text and len(text) <= LONGEST_NAME
    return f"<span>{_text(text)}</span>" if is_name else _text(text)


def _table(table: TextTable) -> str:
    kinds = [' class="number"' if table.is_number(i) else "" for i in range(len(table.header))]
    head = "".join(f"<th{k}>{_text(c)}</th>" for k, c in zip(kinds, table.header, strict=True))
    body = []
    for row in table.rows:
        cells = "".join(f"<td{k}>{_cell(c)}</td>" for k, c in zip(kinds, row, strict=True))
        body.append(f"<tr>{cells}</tr>" if row[0] else f'<tr class="same">{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def figure_html(figure: Figure, caption: str) -> str:
    """A figure as a picture inside the page, with its caption."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img alt="{_text(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _sample(report: "CompressionReport") -> str:
    sample = report.sample
    if not sample["prompt"]:
        return ""
    columns = "".join(
        f"<div><h3>{_text(name)}</h3><pre><i>{_text(sample['prompt'])}</i>{_text(text)}</pre></div>"
        for name, text in (("dense", sample["dense"]), (sample["export"], sample["compressed"]))
    )
    return (
        f'<h2>What they write</h2><section class="pair">{columns}</section>'
        '<p class="note">Both continue the same text (grey) with their most likely tokens.</p>'
    )


def _provenance(report: "CompressionReport") -> str:
    environment = ", ".join(f"{key} {value}" for key, value in report.environment.items())
    sources = TextTable(
        "Calibration text",
        ["file", "documents", "tokens"],
        [[s["path"], f"{s['documents']:,}", f"{s['tokens']:,}"]
         for s in report.calibration["sources"]],
    )  # fmt: skip
    text = section_html(sources) if sources.rows else "<h2>Calibration text</h2><p>No text.</p>"
    recipe = _text(json.dumps(report.recipe, indent=2))
    return (
        f"{text}<h2>How to repeat it</h2><p>{_text(environment)}. The file "
        "recipe.yaml beside this page repeats the run.</p>"
        f"<details><summary>Recipe</summary><pre>{recipe}</pre></details>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@TITLE@</title>
<meta name="viewport" content="width=device-width"><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem;
  margin: 2.5rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h1 { margin-bottom: 0.3rem; } h2 { margin: 2.8rem 0 0.6rem; }
h3 { margin: 0 0 0.4rem; font-size: 1rem; }
.cards, .pair { display: grid; gap: 1rem; grid-template-columns: repeat(3, 1fr); }
.pair { grid-template-columns: repeat(2, 1fr); }
.cards div { background: #eef4fa; border-radius: 0.6rem; padding: 0.9rem 1.1rem; }
.cards strong { font-size: 2.1rem; line-height: 1.2; color: #1f568d; }
.cards small, .note, figcaption { color: #555; font-size: 0.88rem; }
.note { margin: 0.5rem 0; max-width: 48rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
td span { white-space: nowrap; }
th, td { text-align: left; padding: 0.35rem 0.6rem; border-top: 1px solid #ddd;
  vertical-align: top; overflow-wrap: anywhere; }
th { color: #555; font-weight: 600; border-top: 0; vertical-align: bottom; overflow-wrap: normal; }
td { font-variant-numeric: tabular-nums; } tr.same td { border-top: 0; }
.number { text-align: right; overflow-wrap: normal; }
figure { margin: 1rem 0 2.2rem; } img { width: 100%; } figcaption { margin-top: 0.4rem; }
summary { cursor: pointer; font-weight: 600; margin: 0.8rem 0; }
pre { background: #f6f6f6; border-radius: 0.4rem; padding: 0.8rem; margin: 0; font-size: 0.88rem;
  white-space: pre-wrap; overflow-wrap: anywhere; } pre i { color: #888; font-style: normal; }
@media (max-width: 45rem) { .cards, .pair { grid-template-columns: 1fr; } }
@media print { details:not([open]) { display: none; } }
</style></head><body>
@BODY@
</body></html>
"""
