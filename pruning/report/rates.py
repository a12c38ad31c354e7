"""What plans at several prune rates weigh and lose: values, a CSV, a table."""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_jax.files import replace_text
from pruning.kit.words import percent
from pruning.report.html import section_html
from pruning.report.table import TextTable


@dataclass(frozen=True)
class SweepPoint:
    """One plan of a sweep, or the dense model that all are compared with.

    Attributes:
      rate: fraction of the expert channels asked to be removed; 0 for the dense model.
      kept: channels kept in the whole model.
      coverage: share of the channel score that is kept, mean over layers, in [0, 1].
      sizes: bytes of weight files and index by export format, as predicted from shapes.
      quality: text -> nll, perplexity, tokens, kl, top1; empty where nothing was measured.
    """

    rate: float
    kept: int
    coverage: float
    sizes: dict[str, int]
    quality: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    """The dense model and the plans of a sweep, in rising order of prune rate.

    Attributes:
      criterion: name of the channel score.
      dense: the model as it is.
      points: the plans.
    """

    criterion: str
    dense: SweepPoint
    points: tuple[SweepPoint, ...]

    @property
    def texts(self) -> list[str]:
        """Names of the texts that were measured."""
        return list(self.dense.quality)

    def added(self, point: SweepPoint, text: str) -> float:
        """Nats per token of a text above the dense model."""
        return point.quality[text]["nll"] - self.dense.quality[text]["nll"]

    def mean_added(self, point: SweepPoint) -> float:
        """`added` averaged over texts with equal weight."""
        return float(np.mean([self.added(point, text) for text in self.texts]))

    def save(self, folder: Path) -> None:
        """Write sweep.csv, whole or not at all."""
        replace_text(folder / "sweep.csv", self.csv())

    def _repr_html_(self) -> str:
        return section_html(self.table())

    def csv(self) -> str:
        """One row per model, or per model and text where losses were measured."""
        buffer = io.StringIO()
        out = csv.writer(buffer, lineterminator="\n")
        measured = ["text", "tokens", "nll", "added", "kl", "top1"] if self.texts else []
        sizes = [f"bytes_{name}" for name in self.dense.sizes]
        out.writerow(["model", "rate", "kept", "coverage", *sizes, *measured])
        for point in (self.dense, *self.points):
            name = "dense" if point is self.dense else "pruned"
            row = [name, point.rate, point.kept, point.coverage, *point.sizes.values()]
            for text in self.texts:
                q = point.quality[text]
                added = self.added(point, text)
                out.writerow([*row, text, q["tokens"], q["nll"], added, q["kl"], q["top1"]])
            if not self.texts:
                out.writerow(row)
        return buffer.getvalue()

    def table(self) -> TextTable:
        """Every plan with its sizes and, where measured, what it lost, mean over texts."""
        header = ["prune rate", "channels kept", "score covered"]
        header += [f"MB {name}" for name in self.dense.sizes]
        header += ["+nats", "KL", "top-1"] if self.texts else []
        rows = []
        for point in (self.dense, *self.points):
            rate = "dense" if point is self.dense else f"{point.rate:.4g}"
            row = [rate, f"{point.kept:,}", percent(point.coverage)]
            row += [f"{size / 1e6:,.2f}" for size in point.sizes.values()]
            if self.texts and point is self.dense:
                row += ["0", "", ""]
            elif self.texts:
                kl, top1 = (
                    np.mean([point.quality[text][name] for text in self.texts])
                    for name in ("kl", "top1")
                )
                row += [f"{self.mean_added(point):+.4f}", f"{kl:.4f}", percent(float(top1))]
            rows.append(row)
        note = f"Score covered: share of {self.criterion} that is kept, mean over layers. "
        note += "MB: tensors of an export, predicted from shapes. "
        if self.texts:
            tokens = sum(q["tokens"] for q in self.dense.quality.values())
            note += (
                f"Losses: mean over {len(self.texts)} texts, {tokens:,} tokens in all, with the "
                "experts' channels removed and 16-bit weights; 4 bits add to them. +nats: loss per "
                "token above the dense model; KL: nats per token from it; top-1: how often both "
                "prefer the same token."
            )
        return TextTable("Plans", header, rows, note)
