"""A report as one self-contained page, in the order of a user's questions (compression.html)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moe_jax.files import replace_text
from pruning.kit.words import percent
from pruning.report import figures as plots
from pruning.report.choice_table import choice_table
from pruning.report.command import command_line
from pruning.report.compression import CompressionReport
from pruning.report.compression_tables import (
    allocation_table,
    causes_table,
    layer_table,
    losses_table,
    quality_table,
    seen_warning,
    sizes_table,
    stages_table,
    verification_table,
)
from pruning.report.drawing import figure_html
from pruning.report.glossary import GLOSSARY
from pruning.report.html import render
from pruning.report.loading import Loading
from pruning.report.phrases import repair_words
from pruning.report.table import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = tuple["Figure", str]  # with its caption
LAYER_LOSS = {
    "energy": "how much of the layer's output the experts make, per token",
    "attribution": "the sum of the experts' attribution",
    "nll_ig": "the loss that the layer's experts spare together, nats per token",
}
# Planners that do not weigh layers, unless --weights paper makes them.
ONE_LEVEL = frozenset({
    "fair", "fair0.5", "fair2", "linear", "uniform", "random", "global_topk", "normalized_topk",
    "layer_topk",
})  # fmt: skip
MANY = 12  # texts that have a column of their own in a table of the page
EARLIER = "not measured: the report is of an earlier version"


def save(
    report: CompressionReport, folder: Path, notice: str = "", tasks: Sequence[TextTable] = ()
) -> None:
    """Write report.html, whole or not at all; arguments as of `page`."""
    replace_text(Path(folder) / "report.html", page(report, notice, tasks))


def page(report: CompressionReport, notice: str = "", tasks: Sequence[TextTable] = ()) -> str:
    """The whole page, which loads nothing from anywhere.

    Args:
      report: what it shows.
      notice: a clause on what has changed since, shown first.
      tasks: of exports beside the dense model, where they were measured.
    """
    loadings = {name: Loading(**found) for name, found in report.loading.items()}
    return render(
        "compression.html",
        title="Compression report",
        report=report,
        notice=notice,
        tasks=tasks,
        terms=GLOSSARY,
        causes=causes_table(report.sizes, report.alone),
        sizes=sizes_table(report.sizes, report.model),
        verdict=_verdict(report),
        losses=losses_table(report.quality, report.random.get("quality", {})),
        quality=quality_table(report.quality, report.evaluation),
        samples=_samples(report),
        no_sample=report.not_run.get("samples", "there was no text, or the model is too large"),
        loadings=loadings,
        verdicts={
            name: TextTable("Programs", ["program", "loads it", "why"], found.verdicts())
            for name, found in loadings.items()
        },
        command=report.command or command_line({"model": report.model["path"], **report.recipe}),
        environment=", ".join(f"{key} {value}" for key, value in report.environment.items()),
        sources=_sources(report),
        checks=checks_table(report),
        verification=verification_table(report.verification),
        main_figures=[figure_html(*drawn) for drawn in main_figures(report)],
        other_figures=[figure_html(*drawn) for drawn in other_figures(report)],
        layers=layer_table(
            report.counts, report.layer_coverage, report.layer_indices, report.d_expert,
            report.recipe.get("criterion", "channel"), report.concentration,
        ),
        choice=choice_table(choice, MANY) if (choice := report.plan.get("choice")) else None,
        allocation=allocation_table(report.plan, report.sizes, report.model, report.concentration),
        stages=stages_table(report.stages),
    )  # fmt: skip


def _samples(report: CompressionReport) -> list[dict[str, str]]:
    """What both models wrote; an earlier version has one text without its name."""
    earlier = [{"text": "", **report.sample}] if report.sample["prompt"] else []
    return report.samples or earlier


def _verdict(report: CompressionReport) -> str:
    """The loss in a sentence, "" if none was measured."""
    name = report.smallest_export
    if not report.quality or any(name not in models for models in report.quality.values()):
        return ""
    added, of_random = report.added_loss(), report.of_random()
    beside = "" if of_random is None else (
        f" Pruning adds {of_random:.2f} of what random channels at the same size add."
    )  # fmt: skip
    texts = "1 text" if len(report.quality) == 1 else f"{len(report.quality)} texts"
    return (
        f"{report.severity().capitalize()}: {name} adds {added:.3f} nats per token to {texts}, "
        f"which makes the perplexity {np.expm1(added):.1%} larger.{beside} "
        f"{seen_warning(report.evaluation)}".rstrip()
    )


def checks_table(report: CompressionReport) -> TextTable:
    """What was checked, with what result, and what was not."""
    failed = [check for check in report.verification if not check["ok"]]
    undone = [check for check in report.verification if not check.get("done", True)]
    verified = f"{len(report.verification)} checks" if report.verification else "not run"
    verified += f", {len(undone)} of them not done" if undone else ""
    asked = [c for c in report.verification if c["check"] == "logits in transformers"]
    loaded = {c["export"] for c in asked if c.get("done", True)}
    missing = {n: "it was not asked" for n in report.sizes["exports"] if n not in loaded}
    missing |= {c["export"]: c["detail"] for c in asked if c["export"] in missing}
    differs = any("transformers" in check["check"] for check in failed)
    texts, samples = ", ".join(report.quality), _samples(report)
    stability = (report.calibration.get("stability") or {}).get("halves")
    rows = [
        ["every export holds what was planned",
         f"{len(failed)} FAILED" if failed else "ok" if report.verification else "not run",
         verified],
        ["every export computes the same in transformers",
         "FAILED" if differs else "not run" if missing else "ok",
         "; ".join(f"{name}: {why}" for name, why in missing.items()) or "see below"],
        ["what is kept makes up for what is gone",
         *(("repaired", repair_words(report.repair)) if report.repair
           else ("not run", f"repair {report.recipe.get('repair', 'none')}"))],
        ["loss on text", *(("measured", texts) if texts else ("not run", "no text was named"))],
        ["loss of random channels",
         *(("measured", f"seed {report.random['seed']}") if report.random
           else ("not run", report.not_run.get("random", EARLIER)))],
        ["text written by both models",
         *(("shown", f"{len(samples)} prompts") if samples
           else ("not run", report.not_run.get("samples", EARLIER)))],
        ["the choice repeats on other text",
         *(("not run", "it needs calibration text in parts and a criterion that parts can rank")
           if stability is None
           else ("measured", f"two halves of the text agree in {percent(stability)} of the set"))],
    ]  # fmt: skip
    return TextTable("Checks", ["check", "result", "detail"], rows)


def _sources(report: CompressionReport) -> TextTable:
    rows = [
        [source["path"], f"{source['documents']:,}", f"{source['tokens']:,}"]
        for source in report.calibration["sources"]
    ]
    return TextTable("Calibration text", ["file", "documents", "tokens"], rows)


def main_figures(report: CompressionReport) -> list[Drawn]:
    """Figures of what the run decided, each with a caption."""
    widths = [] if report.plan.get("width") == "uniform" else [_widths(report)]
    return [*widths, _layers(report), *(_smoothing(report) if weighs_layers(report.recipe) else [])]


def other_figures(report: CompressionReport) -> list[Drawn]:
    """Figures for who wants to know why, each with a caption; folded on the page."""
    return [
        *([_widths(report)] if report.plan.get("width") == "uniform" else []),
        *_concentrations(report),
        *_routers(report),
        *([] if weighs_layers(report.recipe) else _smoothing(report)),
        *_rounding(report),
        *_stability(report),
    ]


def weighs_layers(recipe: Mapping) -> bool:
    """Whether the planner of a recipe may weigh layers by their loss."""
    return recipe.get("planner") not in ONE_LEVEL or recipe.get("weights") == "paper"


def _widths(report: CompressionReport) -> Drawn:
    figure = plots.plot_widths(np.asarray(report.counts), report.layer_indices, report.d_expert)
    return figure, (
        "One row per layer, one cell per expert, widest first. Bright experts keep all their "
        "channels, the darkest keep none."
    )


def _layers(report: CompressionReport) -> Drawn:
    kept = (np.asarray(report.counts).mean(axis=1) / report.d_expert).tolist()
    unread = "" if report.calibration["tokens"] else "No text was read: all layers count alike. "
    used = "" if weighs_layers(report.recipe) else "; this run's does not"
    measured = report.recipe.get("layer_loss", "energy")
    figure = plots.plot_layers(
        report.layer_loss["raw"], report.layer_loss["smoothed"], report.layer_coverage, kept,
        report.layer_indices,
    )  # fmt: skip
    return figure, (
        f"{unread}Top: {LAYER_LOSS.get(measured, measured)}; planners that "
        f"weigh layers use the smoothed line{used}. Middle: share of the channel score that is "
        "kept. Bottom: share of the channels that is kept."
    )


def _concentrations(report: CompressionReport) -> list[Drawn]:
    counts, middle = np.asarray(report.counts), len(report.counts) // 2
    fractions, curves = (np.asarray(report.concentration[n]) for n in ("fractions", "curves"))
    bars = plots.plot_expert_bars(
        curves[middle], counts[middle], np.asarray(report.attribution)[middle],
        report.layer_indices[middle], report.d_expert,
    )  # fmt: skip
    return [
        (plots.plot_concentration(fractions, curves, report.layer_indices),
         "One line per expert. The more a line bends, the fewer channels hold the expert's score, "
         "and the cheaper it is to prune."),
        (bars,
         "The experts of one layer. A bar is an expert's channel score in ten steps: the darkest "
         "step is its best tenth of channels. Red: how many channels it keeps. Gold: how much the "
         "expert matters to the layer."),
    ]  # fmt: skip


def _routers(report: CompressionReport) -> list[Drawn]:
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


def _smoothing(report: CompressionReport) -> list[Drawn]:
    """What the layers' weights would be under each smoothing, if the layers differ."""
    raw, used = np.asarray(report.layer_loss["raw"]), report.recipe.get("smoothing")
    if len(raw) < 2 or np.ptp(raw) == 0:
        return []
    caption = (
        "The layer losses above, and what a planner that weighs layers makes of them under each "
        "smoothing: the flatter, the more evenly the layers are pruned."
    )
    return [(plots.plot_smoothing(raw, report.layer_indices, used), caption)]


def _stability(report: CompressionReport) -> list[Drawn]:
    """How the kept set settled, if the text was scored in parts that can be compared."""
    found = report.calibration.get("stability") or {}
    known = [overlap for overlap in found.get("jaccard", ()) if overlap is not None]
    if not known:
        return []
    halves = found["halves"]
    figure = plots.plot_stability(
        found["tokens"][-len(known):], known, halves,
        share=report.kept_share, wanted=report.recipe.get("until_stable"),
    )  # fmt: skip
    apart = "" if halves is None else f" (here {halves:.1%})"
    caption = (
        "Overlap of two sets of kept channels: those in both over those in either. Blue: the set "
        "before and after each further part of the text; near 100% more text changes little. Red: "
        f"the sets of the even and of the odd parts, half the text each{apart}: how well the "
        "choice repeats on other text. Grey: two random sets."
    )
    return [(figure, caption)]


def _rounding(report: CompressionReport) -> list[Drawn]:
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
