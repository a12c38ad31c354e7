"""What a run did: JSON for programs, a table for the terminal, a page to look at."""

import base64
import dataclasses
import html as escape_html
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from pruning import plots
from pruning.files import replace_text

VERSION = 1


@dataclass(frozen=True)
class CompressionReport:
    """Plain JSON values; L layers with experts, E experts, K points of a curve.

    Attributes:
      model: path, family, fingerprint, parameters, bytes.
      recipe: the resolved recipe.
      calibration: tokens and sources.
      plan: provenance of the plan.
      layer_indices: [L] index of each expert layer in the model.
      d_expert: channels per expert before pruning.
      counts: [L][E] channels kept.
      attribution: [L][E] expert scores.
      expert_coverage: [L][E].
      layer_coverage: [L].
      layer_loss: raw [L] and smoothed [L].
      concentration: fractions [K] and curves [L][E][K].
      sizes: source_bytes, channels, channels_kept, exports by name.
      quality: by text and variant: nll, perplexity, tokens, kl, top1.
      evaluation: window and stride in tokens.
      stages: name, seconds, peak_memory_bytes.
      sample: prompt, dense, compressed.
      verification: export, check, ok, detail.
    """

    model: dict[str, Any]
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    plan: dict[str, Any]
    layer_indices: list[int]
    d_expert: int
    counts: list[list[int]]
    attribution: list[list[float]]
    expert_coverage: list[list[float]]
    layer_coverage: list[float]
    layer_loss: dict[str, list[float]]
    concentration: dict[str, Any]
    sizes: dict[str, Any]
    quality: dict[str, dict[str, dict[str, Any]]]
    evaluation: dict[str, Any]
    stages: list[dict[str, Any]]
    sample: dict[str, str]
    verification: list[dict[str, Any]]

    def __post_init__(self) -> None:
        broken = [f.name for f in dataclasses.fields(self) if not _finite(getattr(self, f.name))]
        if broken:
            raise ValueError(f"the report's {', '.join(broken)} hold NaN or infinity")

    def save(self, folder: Path) -> None:
        """Write report.json and report.html, each atomically."""
        values = {"version": VERSION, **dataclasses.asdict(self)}
        replace_text(Path(folder) / "report.json", json.dumps(values, indent=2) + "\n")
        replace_text(Path(folder) / "report.html", html(self))

    @classmethod
    def load(cls, path: Path) -> "CompressionReport":
        """Read report.json.

        Raises:
          ValueError: missing, or of another version.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist; run `moe-compress compress` first")
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            version = values.pop("version", None)
        except (json.JSONDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is not a report ({error}); compress again") from None
        names = {field.name for field in dataclasses.fields(cls)}
        if version != VERSION or set(values) != names:
            raise ValueError(f"{path} is not a report of version {VERSION}; compress again")
        return cls(**values)


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


Rows = tuple[str, list[str], list[list[str]]]  # title, header, rows


def tables(report: CompressionReport) -> list[Rows]:
    """The report's numbers as text tables: sizes, quality, verification, stages."""
    source = report.sizes["source_bytes"]
    sizes = [["source", f"{source / 1e6:.1f}", "1.00", _bits(source, report.model), ""]]
    for name, size in report.sizes["exports"].items():
        padded = size["padded_bytes"]
        sizes.append(
            [name, f"{size['bytes'] / 1e6:.1f}", f"{source / size['bytes']:.2f}",
             f"{size['bits_per_parameter']:.2f}", f"{padded / 1e6:.1f}" if padded else ""]
        )  # fmt: skip
    quality = [
        [text, variant, f"{q['nll']:.4f}", f"{q['perplexity']:.2f}", str(q["tokens"]),
         _number(q["kl"]), _number(q["top1"])]
        for text, variants in report.quality.items()
        for variant, q in variants.items()
    ]  # fmt: skip
    checks = [
        [check["export"], check["check"], "ok" if check["ok"] else "FAILED", check["detail"]]
        for check in report.verification
    ]
    stages = [
        [stage["name"], f"{stage['seconds']:.1f}", f"{stage['peak_memory_bytes'] / 1e6:.0f}"]
        for stage in report.stages
    ]
    return [
        ("Sizes", ["folder", "MB", "times smaller", "bits per parameter", "MB if padded"], sizes),
        (
            "Quality",
            ["text", "model", "nats/token", "perplexity", "tokens", "KL", "top-1"],
            quality,
        ),
        ("Verification", ["export", "check", "result", "detail"], checks),
        ("Stages", ["stage", "seconds", "peak MB"], stages),
    ]


def _bits(size: int, model: dict) -> str:
    return f"{size * 8 / model['parameters']:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def terminal_table(report: CompressionReport) -> Group:
    """The same tables for a terminal."""
    shown = []
    for title, header, rows in tables(report):
        table = Table(title=title, title_justify="left")
        for column in header:
            table.add_column(column)
        for row in rows:
            table.add_row(*map(escape, row))
        shown.append(table)
    return Group(*shown)


def figures(report: CompressionReport) -> list[tuple[Figure, str]]:
    """Figures with a sentence each."""
    counts = np.asarray(report.counts)
    fractions = np.asarray(report.concentration["fractions"])
    curves = np.asarray(report.concentration["curves"])
    kept = (counts.mean(axis=1) / report.d_expert).tolist()
    middle = len(counts) // 2
    bars = plots.plot_expert_bars(
        curves[middle], counts[middle], np.asarray(report.attribution)[middle],
        report.layer_indices[middle], report.d_expert,
    )  # fmt: skip
    layers = plots.plot_layers(
        report.layer_loss["raw"], report.layer_loss["smoothed"], report.layer_coverage, kept,
        report.layer_indices,
    )  # fmt: skip
    return [
        (plots.plot_widths(counts, report.layer_indices, report.d_expert),
         "The budget is spent where it covers most: bright experts keep all their channels."),
        (layers,
         "Layer loss decides a layer's budget; coverage is the share of its channel score kept."),
        (plots.plot_concentration(fractions, curves, report.layer_indices),
         "The more a curve bends, the fewer channels hold an expert's score."),
        (bars, "One layer's experts: the darker, the better the channels; red: what is kept."),
    ]  # fmt: skip


def html(report: CompressionReport) -> str:
    """One self-contained page."""
    parts = ["<h1>Compression report</h1>", _summary(report)]
    for title, header, rows in tables(report):
        parts += [f"<h2>{title}</h2>", _html_table(header, rows)]
    parts.append("<h2>Figures</h2>")
    for figure, caption in figures(report):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=130)
        data = base64.b64encode(buffer.getvalue()).decode()
        parts.append(
            f'<figure><img alt="{_escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_escape(caption)}</figcaption></figure>"
        )
    for key, text in report.sample.items():
        parts.append(f"<h3>Sample: {_escape(key)}</h3><pre>{_escape(text)}</pre>")
    recipe = _escape(json.dumps(report.recipe, indent=2))
    parts.append(f"<h2>Recipe</h2><pre>{recipe}</pre>")
    return _PAGE.replace("@BODY@", "\n".join(parts))


def _summary(report: CompressionReport) -> str:
    kept, total = report.sizes["channels_kept"], report.sizes["channels"]
    return (
        f"<p>{_escape(report.model['path'])} ({_escape(report.model['family'])}, "
        f"{report.model['parameters'] / 1e6:.1f} M parameters): {kept:,} of {total:,} expert "
        f"channels kept, scored on {report.calibration['tokens']:,} tokens; evaluated in windows "
        f"of {report.evaluation['window']} tokens.</p>"
    )


def _html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _escape(text: Any) -> str:
    return escape_html.escape(str(text))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Compression report</title><style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; padding: 0.3rem 0.6rem; border-bottom: 1px solid #eee; }
th { color: #555; } td { font-variant-numeric: tabular-nums; }
figure { margin: 2rem 0; } img { max-width: 100%; } figcaption { color: #555; }
pre { background: #f6f6f6; padding: 0.8rem; overflow-x: auto; white-space: pre-wrap; }
</style></head><body>
@BODY@
</body></html>
"""
