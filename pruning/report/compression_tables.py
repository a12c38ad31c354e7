"""A report's numbers as text: what the terminal prints and the page shows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from pruning.report.table import TextTable, allocation_table
from pruning.text.held_out import not_held_out

if TYPE_CHECKING:
    from pruning.report.compression import CompressionReport


@dataclass(frozen=True)
class Headline:
    """One number that people ask for first, and the words around it."""

    number: str
    unit: str
    detail: str


def headlines(report: "CompressionReport") -> list[Headline]:
    """Times smaller, quality lost and tokens, all of the smallest export."""
    name = smallest_export(report)
    size, source = report.sizes["exports"][name], report.sizes["source_bytes"]
    smaller = Headline(
        f"{source / size['bytes']:.2f}",
        "times smaller",
        f"{source / 1e6:,.1f} MB become {size['bytes'] / 1e6:,.1f} MB ({name})",
    )
    pairs = [(v["dense"], v[name]) for v in report.quality.values() if {"dense", name} <= set(v)]
    evaluated = sum(dense["tokens"] for dense, _ in pairs)
    measured = f"{evaluated:,} tokens evaluated" if evaluated else "none evaluated"
    tokens = Headline(
        f"{report.calibration['tokens']:,}",
        "tokens scored",
        measured,
    )
    if not report.calibration["tokens"]:
        tokens = Headline("no text", "scored", f"the weights alone decided; {measured}")
    if not pairs:
        lost = Headline("?", "quality lost", "not measured; name a text with --evaluation")
        return [smaller, lost, tokens]
    added = _mean(pairs, lambda dense, small: small["nll"] - dense["nll"])
    top1 = _mean(pairs, lambda dense, small: small["top1"])
    lost = Headline(
        f"{added:+.3f}",
        "nats per token",
        f"perplexity times {np.exp(added):.3f}; same top token as dense at {100 * top1:.1f}%",
    )
    return [smaller, lost, tokens]


def smallest_export(report: "CompressionReport") -> str:
    """Name of the export with the fewest bytes."""
    exports = report.sizes["exports"]
    return min(exports, key=lambda name: exports[name]["bytes"])


def _mean(pairs, value) -> float:
    """Mean over the tokens of all texts."""
    weights = [dense["tokens"] for dense, _ in pairs]
    return float(np.average([value(*pair) for pair in pairs], weights=weights))


def tables(report: "CompressionReport") -> list[TextTable]:
    """Sizes, quality, allocation, verification and stages."""
    return [
        _sizes(report), _quality(report), allocation_table(report), _verification(report),
        _stages(report),
    ]  # fmt: skip


def _sizes(report: "CompressionReport") -> TextTable:
    source, sizes = report.sizes["source_bytes"], report.sizes
    bits = source * 8 / report.model["parameters"]
    rows = [["source", f"{sizes['channels']:,}", _megabytes(source), "", "1.00", f"{bits:.2f}"]]
    for name, size in sizes["exports"].items():
        padded = size["padded_bytes"]
        rows.append(
            [name, f"{sizes['channels_kept']:,}", _megabytes(size["bytes"]),
             _megabytes(padded) if padded else "", f"{source / size['bytes']:.2f}",
             f"{size['bits_per_parameter']:.2f}"]
        )  # fmt: skip
    header = ["folder", "channels kept", "MB written", "MB if padded", "times smaller",
              "bits per parameter"]  # fmt: skip
    note = (
        "MB if padded: the same plan stored at the width of its widest expert, for programs that "
        "know one width only. Bits count all bytes written over the parameters that are left."
    )
    return TextTable("Sizes", header, rows, note)


def _quality(report: "CompressionReport") -> TextTable:
    rows = []
    for text, variants in report.quality.items():
        for number, (variant, q) in enumerate(variants.items()):
            top1 = "" if q["top1"] is None else f"{100 * q['top1']:.1f}%"
            kl = "" if q["kl"] is None else f"{q['kl']:.4f}"
            rows.append(
                [text if number == 0 else "", variant, f"{q['nll']:.4f}", f"{q['perplexity']:.2f}",
                 kl, top1, f"{q['tokens']:,}"]
            )  # fmt: skip
    header = ["text", "model", "nats/token", "perplexity", "KL", "top-1", "tokens"]
    note = (
        f"Windows of {report.evaluation['window']:,} tokens. KL: divergence of the dense model's "
        "predictions from this model's, nats per token. top-1: positions with the same most likely "
        "token as the dense model."
    )
    return TextTable("Quality", header, rows, f"{_warning(report)} {note}".lstrip())


def _warning(report: "CompressionReport") -> str:
    return not_held_out(report.evaluation.get("seen", {}))


def _verification(report: "CompressionReport") -> TextTable:
    rows, last = [], None
    for check in report.verification:
        name = check["export"] if check["export"] != last else ""
        last = check["export"]
        result = "ok" if check["ok"] else "FAILED"
        rows.append([name, check["check"], result, check["detail"]])
    return TextTable("Verification", ["export", "check", "result", "detail"], rows)


def _stages(report: "CompressionReport") -> TextTable:
    stages = report.stages
    rows = [
        [stage["name"], f"{stage['seconds']:.1f}", f"{stage['peak_memory_bytes'] / 1e6:,.0f}"]
        for stage in stages
    ]
    total = sum(stage["seconds"] for stage in stages)
    peak = max((stage["peak_memory_bytes"] for stage in stages), default=0)
    rows.append(["all", f"{total:.1f}", f"{peak / 1e6:,.0f}"])
    note = "Peak: the largest resident memory of the process up to the end of the stage."
    return TextTable("Stages", ["stage", "seconds", "peak MB"], rows, note)


def layer_table(report: "CompressionReport") -> TextTable:
    """What every layer keeps; as long as the model is deep, so for the page only."""
    rows = []
    for slot, (layer, counts) in enumerate(zip(report.layer_indices, report.counts, strict=True)):
        kept = np.asarray(counts)
        rows.append(
            [str(layer), f"{kept.sum():,}", f"{100 * kept.mean() / report.d_expert:.1f}%",
             f"{kept.min():,}", f"{kept.max():,}", str((kept == 0).sum()),
             f"{100 * report.layer_coverage[slot]:.1f}%"]
        )  # fmt: skip
    header = ["layer", "channels kept", "share kept", "narrowest expert", "widest expert",
              "empty experts", "score covered"]  # fmt: skip
    criterion = report.recipe.get("criterion", "channel")
    note = f"Score covered: share of the layer's {criterion} score that the kept channels hold."
    return TextTable("Layer by layer", header, rows, note)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def terminal_table(report: "CompressionReport") -> Group:
    """The headline and the tables for a terminal; names fold where it is narrow, none is cut."""
    parts: list = []
    for line in headlines(report):
        parts.append(Text.assemble((f"{line.number} {line.unit}", "bold"), f"  {line.detail}"))
    if warning := _warning(report):
        parts.append(Text(warning))
    return Group(*parts, *map(as_rich, tables(report)))


def as_rich(table: TextTable) -> Table:
    """A table for a terminal."""
    shown = Table(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column, name in enumerate(table.header):
        numbers = table.is_number(column)
        # Names of formats and variants stay whole; longer ones, such as files', may fold.
        least = min(13, max(len(row[column]) for row in table.rows)) if table.rows else None
        shown.add_column(
            name, justify="right" if numbers else "left", overflow="fold",
            min_width=None if numbers else least,
        )  # fmt: skip
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown
