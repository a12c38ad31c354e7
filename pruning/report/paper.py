"""The paper's tables of one model as a value: every method at every rate, before and after."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert.export_format import FormatName
from pruning.kit.words import megabytes, percent
from pruning.report.compared import CHOSEN, UNPRUNED, Result
from pruning.report.comparison import Comparison
from pruning.report.comparison_tasks import (
    Answers,
    Row,
    answers_of,
    cell,
    difference_word,
    is_share,
    share_word,
)
from pruning.report.html import render
from pruning.report.phrases import NOMINALLY, nominally
from pruning.report.table import TextTable

FORMATS: dict[int, FormatName] = {16: "ragged-bf16", 8: "ragged-int8", 4: "ragged-int4"}
WHOLE = "whole model"
LABELS = {"paper-act": "the paper's rule", "uniform-act": "uniform widths"}


@dataclass(frozen=True)
class Method:
    """A row of the tables, at every rate and in every format.

    Attributes:
      label: in tables.
      rule: of `compare`.
      repair: how its plans are repaired without training, "" if not.
    """

    label: str
    rule: str
    repair: str = ""


@dataclass(frozen=True)
class Timed:
    """How fast one layer's experts are.

    Attributes:
      rate: prune rate; 0 of the dense model.
      block: widths are multiples of it; 0 of the dense model.
      tokens_per_second: median of all repetitions, and their quartiles.
      bytes: of the experts in memory.
    """

    rate: float
    block: int
    tokens_per_second: tuple[float, float, float]
    bytes: int


@dataclass(frozen=True)
class Paper:
    """All that the tables and figures are made of.

    Attributes:
      pruned: what `compare` measured.
      recovered: the same plans once trained; None if they were not.
      methods: the rows.
      recovery: what was trained, in words.
      timed: of figure 10, the dense model first.
      environment: date, device and versions of the run's beginning; model, its folder; tokens and
        layer of figure 10.
    """

    pruned: Comparison
    recovered: Comparison | None
    methods: tuple[Method, ...]
    recovery: str
    timed: tuple[Timed, ...]
    environment: dict[str, Any]

    @property
    def is_judged(self) -> bool:
        """Whether tasks were asked."""
        return any(result.tasks for result in self.pruned.results)

    def halves(self) -> list[tuple[str, Comparison]]:
        """What is shown apart: without training and, if there was one, with it."""
        found = [("Without recovery", self.pruned)]
        if self.recovered is not None:
            found.append((f"With recovery: {self.recovery}", self.recovered))
        return found

    def lines(self, half: Comparison) -> list[tuple[str, Result]]:
        """Rows of one half: what is whole first, then by rate, formats and methods."""
        names = {(one.rule, one.repair): one.label for one in self.methods}
        names[UNPRUNED, ""] = WHOLE
        order = list(names)
        own = [
            one for one in half.results
            if (one.rule, one.repair) in names and not one.target and not one.seed
            and not one.cut and not one.has_fewer and one.is_of_text
        ]  # fmt: skip
        own.sort(key=lambda one: (one.rate, -one.bits, order.index((one.rule, one.repair))))
        return [(names[one.rule, one.repair], one) for one in own]

    def added(self, result: Result) -> float:
        """Nats per token above the dense model, texts with equal weight."""
        return self.pruned.added([result])[0]

    def tables(self) -> list[TextTable]:
        """The tables of both halves, and the times of figure 10."""
        found = [self._table(title, half) for title, half in self.halves()]
        return [*found, *self._timed_table()]

    def _table(self, title: str, half: Comparison) -> TextTable:
        lines = self.lines(half)
        answers = {id(one): answers_of([one]) for _, one in lines if one.tasks}
        names = _tasks(answers.values())
        header = ["method", "pruned", "bits"]
        header += [*names, "mean", "difference", "real?"] if names else []
        header += ["+nats", "KL", "MB", "factor", "nominal"]
        rows = [self._dense_row(names)] if half is self.pruned else []
        for label, one in lines:
            row = [label, percent(one.rate), str(one.bits)]
            if names:
                row += _task_cells(answers.get(id(one)), names)
            kl = float(np.mean([found["kl"] for found in one.quality.values()]))
            row += [f"{self.added(one):.4f}", f"{kl:.4f}", megabytes(one.bytes)]
            rows.append([*row, f"{self.factor(one):.2f}", self.nominal(one)])
        return TextTable(title, header, rows, self._note(names, half))

    def _dense_row(self, names: Sequence[str]) -> list[str]:
        cells: list[str] = []
        if names:
            known = [answers_of([one]) for _, one in self.lines(self.pruned) if one.tasks]
            for name in names:
                row = next(line.rows[name][0] for line in known if name in line.rows)
                as_dense = {**row, "second": row["first"], "difference": 0.0}
                cells.append(_with_error(cell([as_dense]), row, "first_error"))  # fmt: skip
            cells += [share_word(known[0].mean + known[0].lost), "", ""]
        size = megabytes(self.pruned.sizes["dense"])
        return [WHOLE, "0.0%", "16", *cells, "0.0000", "0.0000", size, "1.00", "1.00"]

    def factor(self, result: Result) -> float:
        """How many times smaller than the dense model in 16 bits, in bytes written."""
        return self.pruned.sizes["dense"] / result.bytes

    def nominal(self, result: Result) -> str:
        """The same as papers count."""
        dense = self.pruned.sizes["dense"] // 2
        return nominally(FORMATS[result.bits], dense, result.parameters)

    def _note(self, names: Sequence[str], half: Comparison) -> str:
        tokens = sum(text["tokens"] for text in self.pruned.dense.values())
        note = (
            f"+nats and KL: per token, above and from the dense model, mean over "
            f"{len(self.pruned.dense)} texts of {tokens:,} tokens in all. MB, factor: of the "
            f"weights as written, against the dense model in 16 bits. {NOMINALLY}"
        )
        if names:
            note = (
                "Right answers in percent ± one standard error; * is off the dense model by two "
                "standard errors of the paired difference or more. Mean: over tasks; difference: "
                f"of it ± one standard error of the same questions. {note}"
            )
        refused = [
            f"{one.name} at {one.place} ({one.reason})" for one in half.refused
            if (one.rule, one.repair) in {(each.rule, each.repair) for each in self.methods}
        ]  # fmt: skip
        return f"{note} Not possible: {'; '.join(refused)}." if refused else note

    def _timed_table(self) -> list[TextTable]:
        rows = []
        for one in self.timed:
            middle, low, high = one.tokens_per_second
            rows.append([
                percent(one.rate) if one.block else "dense", str(one.block or ""), f"{middle:,.0f}",
                f"{low:,.0f} to {high:,.0f}", megabytes(one.bytes),
            ])  # fmt: skip
        if not rows:
            return []
        note = (
            f"The experts of layer {self.environment['layer']} alone, "
            f"{self.environment['timed_tokens']:,} random states at once, on "
            f"{self.environment['device']}: median and quartiles of {self.environment['repeats']} "
            "runs; MB in memory."
        )
        header = ["pruned", "block", "tokens per second", "quartiles", "MB"]
        return [TextTable("Throughput over alignment (figure 10)", header, rows, note)]

    def csv(self) -> str:
        """One row per method, rate, format, recovery and measure, for spreadsheets."""
        buffer = io.StringIO()
        out = csv.writer(buffer, lineterminator="\n")
        out.writerow(["method", "rule", "repair", "recovery", "rate", "bits", "measure", "value",
                      "error", "dense", "difference", "difference_error", "within_noise", "bytes",
                      "factor", "nominal"])  # fmt: skip
        for (_, half), recovery in zip(self.halves(), ("", self.recovery), strict=False):
            for label, one in self.lines(half):
                what = [label, one.rule, one.repair, recovery, one.rate, one.bits]
                sizes = [one.bytes, round(self.factor(one), 4), self.nominal(one)]
                for text, found in one.quality.items():
                    dense = self.pruned.dense[text]["nll"]
                    out.writerow([*what, f"nll {text}", found["nll"], "", dense,
                                  found["nll"] - dense, "", "", *sizes])  # fmt: skip
                for row in one.tasks:
                    out.writerow([
                        *what, f"{row['task']} {row['metric']}", row["second"],
                        row["second_error"], row["first"], row["difference"], row["error"],
                        row["within_noise"], *sizes,
                    ])  # fmt: skip
        return buffer.getvalue()

    def markdown(self) -> str:
        """The tables for a README."""
        return render("paper.md", title=self.title, head=self.head, tables=self.tables())

    @property
    def title(self) -> str:
        """Of the page."""
        return f"The paper's tables on {self.environment['model']}"

    @property
    def head(self) -> str:
        """How the tables came about, one sentence each."""
        told = self.environment
        rules = ", ".join(f"{one.label} is {_rule_words(one)}" for one in self.methods)
        return (
            f"The protocol of arXiv 2606.18304, run by moe-jax {told['moe-jax']} on "
            f"{told['device']}, begun {told['date']}. Rows: {rules}. All keep the same number of "
            "channels at a rate; one pass over the calibration text serves all of them."
        )


def _rule_words(method: Method) -> str:
    what = "what planner auto takes" if method.rule == CHOSEN else f"rule {method.rule}"
    return f"{what}, repaired without training" if method.repair else what


def labelled(names: Sequence[str], best: str, repair: str) -> tuple[Method, ...]:
    """The rows for rules of `compare`.

    Args:
      names: of rules, of those that drop whole experts only the `best`.
      best: of these; "" if there is none.
      repair: of what planner auto takes.
    """
    found = []
    for name in names:
        if name == CHOSEN:
            if repair:
                found.append(Method("ours", name, repair))
            found.append(Method("ours, not repaired" if repair else "ours", name))
        elif name == best:
            found.append(Method("best expert removal", name))
        else:
            found.append(Method(LABELS.get(name, name), name))
    return tuple(found)


def best_of(found: Comparison, names: Sequence[str]) -> str:
    """Of some rules the one that loses least in the most bits, mean over all rates; "" where none
    has a plan at all of them."""
    bits = max(found.bits)
    losses: dict[str, list[float]] = {}
    for one in found.results:
        if one.rule in names and one.bits == bits and not one.repair:
            losses.setdefault(one.rule, []).append(found.added([one])[0])
    whole = {name: np.mean(own) for name, own in losses.items() if len(own) == len(found.rates)}
    return min(whole, key=lambda name: whole[name], default="")


def _tasks(answers: Iterable[Answers]) -> list[str]:
    return list(dict.fromkeys(name for one in answers for name in one.rows))


def _task_cells(found: Answers | None, names: Sequence[str]) -> list[str]:
    """Of each task, the mean, its difference, and whether that is more than noise."""
    if found is None:
        return [""] * (len(names) + 3)
    cells = []
    for name in names:
        rows = found.rows.get(name, [])
        cells.append(_with_error(cell(rows), rows[0], "second_error") if rows else "")
    sure = "" if math.isnan(found.error) else "within noise" if found.is_noise else "yes"
    return [*cells, share_word(found.mean), difference_word(found), sure]


def _with_error(value: str, row: Row, name: str) -> str:
    """A value with the error of that name, a share's in percent too."""
    error = row[name]
    if error is None:
        return value
    return f"{value} ± {100 * error:.1f}" if is_share(row) else f"{value} ± {error:.2g}"
