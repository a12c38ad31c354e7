"""A comparison by what the models still can do: tasks in tables, and accuracy over bytes."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pruning.kit.words import megabytes, percent
from pruning.measure.paired import NOISE
from pruning.report.compared import Result, bits_word
from pruning.report.comparison import Comparison
from pruning.report.comparison_sizes import ALIKE, COLOURS
from pruning.report.drawing import GREY, new_figure, plain
from pruning.report.table import TextTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = ("acc_norm", "acc", "exact_match")  # of a task, the first that it has; others are no share
CAPTION = (
    "Mean share of right answers over tasks against bytes of the folder that each plan would be "
    "written as, weights alone. Further left is smaller, higher is better; a bar is one standard "
    "error of the difference from the dense model (the square and the dashed line), over the same "
    "questions. A line joins what answers best in its bits at each size."
)

Row = Mapping[str, Any]  # `Paired.to_dict`


@dataclass(frozen=True)
class Answers:
    """What the models of one rule at one rate in one number of bits answer; seeds are averaged.

    Attributes:
      first: a result of it, for its name, bits, rate and bytes.
      rows: of each task, one for each seed.
      mean: share of right answers, mean over tasks with equal weight; nan if no task has one.
      lost: how far that is below the dense model.
      error: standard error of `lost`; nan where one of a task is not known.
    """

    first: Result
    rows: dict[str, list[Row]]
    mean: float
    lost: float
    error: float

    @property
    def is_noise(self) -> bool:
        """Whether the mean differs from the dense model's by less than its error allows."""
        return abs(self.lost) < NOISE * self.error

    @property
    def bytes(self) -> int:
        """Of the folder."""
        return self.first.bytes


def answered(found: Comparison) -> list[Answers]:
    """Of all that was asked; the largest folders first, and of those the best answers."""
    groups: dict[tuple, list[Result]] = {}
    for result in found.results:
        if result.tasks:
            place = result.target or result.rate
            groups.setdefault((result.name, result.bits, place), []).append(result)
    lines = [answers_of(group) for group in groups.values()]
    return sorted(lines, key=lambda one: (-one.bytes, math.isnan(one.lost), one.lost))


def task_tables(found: Comparison) -> list[TextTable]:
    """A row for each plan, a column for each task, as the papers have them."""
    lines = answered(found)
    if not lines:
        return []
    names = list(dict.fromkeys(name for line in lines for name in line.rows))
    dense = found.sizes.get("dense", 0)
    known = [next(line.rows[name][0] for line in lines if name in line.rows) for name in names]
    whole = [_value(one, one["first"]) for one in known]
    mean = share_word(lines[0].mean + lines[0].lost)
    rows = [["dense", "16", "", megabytes(dense), "1.00", *whole, mean, "", ""]]
    for line in lines:
        cells = [cell(line.rows.get(name, ())) for name in names]
        sure = "" if math.isnan(line.error) else "within noise" if line.is_noise else "yes"
        factor = f"{dense / line.bytes:.2f}" if line.bytes else ""
        rows.append([
            line.first.name, bits_word(line.first.bits), percent(line.first.rate),
            megabytes(line.bytes), factor, *cells, share_word(line.mean), difference_word(line),
            sure,
        ])  # fmt: skip
    header = ["rule", "bits", "pruned", "MB", "factor", *names, "mean", "difference", "real?"]
    note = (
        "Asked by lm-evaluation-harness: right answers in percent, length-normalised where a task "
        "has that; other measures as they are, and in no mean. * is off the dense model by "
        "two standard errors of the paired difference or more. factor: of 16-bit weights; "
        "mean: over tasks, its difference ± one standard error of the same questions."
    )
    return [TextTable("What the models still answer", header, rows, note)]


def plot_tasks(found: Comparison) -> "Figure":
    """Mean accuracy against bytes, a line of the best for each number of bits (figure 9)."""
    lines = [line for line in answered(found) if not math.isnan(line.mean)]
    figure = new_figure(4.6)
    axes = figure.subplots()
    for bits in sorted({line.first.bits for line in lines}, reverse=True):
        own, colour = [line for line in lines if line.first.bits == bits], COLOURS.get(bits, GREY)
        places, means = [line.bytes / 1e6 for line in own], [100 * line.mean for line in own]
        errors = [100 * line.error for line in own]
        axes.errorbar(places, means, yerr=errors, fmt="o", color=colour, markersize=3, alpha=0.5,
                      elinewidth=0.8)  # fmt: skip
        front = best_at_each_size(own)
        axes.plot([line.bytes / 1e6 for line in front], [100 * line.mean for line in front], "-",
                  color=colour, label=f"{bits_word(bits)} bits")  # fmt: skip
        if front:
            axes.annotate(front[0].first.rule, (front[0].bytes / 1e6, 100 * front[0].mean),
                          xytext=(6, -10), textcoords="offset points", fontsize=8)  # fmt: skip
    if lines:
        whole = 100 * (lines[0].mean + lines[0].lost)
        axes.axhline(whole, color=GREY, linewidth=0.8, linestyle="--")
        if found.sizes:
            axes.plot([found.sizes["dense"] / 1e6], [whole], "s", color=GREY, markersize=6)
    plain(axes)
    axes.set(xlabel="weights as written, MB", ylabel="right answers, %, mean over tasks")
    axes.set_title("Accuracy against bytes", loc="left")
    if lines:
        axes.legend(frameon=False)
    return figure


def best_at_each_size(lines: Sequence[Answers]) -> list[Answers]:
    """Those of which no other is as small, to `ALIKE`, and answers better; smallest first."""

    def is_behind(line: Answers) -> bool:
        return any(x.lost < line.lost and x.bytes <= ALIKE * line.bytes for x in lines)

    return sorted((x for x in lines if not is_behind(x)), key=lambda x: x.bytes)


def tasks_csv(found: Comparison) -> str:
    """One row per plan, task and metric."""
    buffer = io.StringIO()
    out = csv.writer(buffer, lineterminator="\n")
    names = {"first": "dense", "first_error": "dense_error", "second": "value",
             "second_error": "value_error"}  # fmt: skip
    said = [
        "task", "metric", "shots", "documents", *names, "difference", "error", "gained", "lost",
        "p", "within_noise",
    ]  # fmt: skip
    what = ["rule", "rate", "seed", "repair", "bits", "target", "bytes"]
    out.writerow([*what, *(names.get(name, name) for name in said)])
    for result in found.results:
        for row in result.tasks:
            out.writerow([*(getattr(result, name) for name in what), *(row[name] for name in said)])
    return buffer.getvalue()


def answers_of(group: Sequence[Result]) -> Answers:
    """What results of one rule at one rate, which differ in their seeds, answer together."""
    rows: dict[str, list[Row]] = {}
    for result in group:
        for name, row in _one_each(result.tasks).items():
            rows.setdefault(name, []).append(row)
    shares = [own for own in rows.values() if is_share(own[0])]
    if not shares:
        return Answers(group[0], rows, math.nan, math.nan, math.nan)
    means, lost = (
        sum(sum(row[key] for row in own) / len(own) for own in shares) / len(shares)
        for key in ("second", "difference")
    )
    errors = [_error(own) for own in shares]
    return Answers(group[0], rows, means, -lost, math.hypot(*errors) / len(errors))


def _one_each(rows: Sequence[Row]) -> dict[str, Row]:
    """The measure of each task that is shown, groups of tasks left out, whose members are there."""
    found: dict[str, Row] = {}
    for row in rows:
        before = found.get(row["task"])
        if row["documents"] and (before is None or _rank(row) < _rank(before)):
            found[row["task"]] = row
    return found


def _rank(row: Row) -> int:
    metric = row["metric"].partition(",")[0]
    return SHARES.index(metric) if metric in SHARES else len(SHARES)


def is_share(row: Row) -> bool:
    """Whether a measure is a share of right answers."""
    return _rank(row) < len(SHARES)


def _error(rows: Sequence[Row]) -> float:
    """Standard error of a task's mean difference over seeds, whose questions are the same."""
    known = [row["error"] for row in rows]
    return math.nan if None in known else sum(known) / len(known)


def cell(rows: Sequence[Row]) -> str:
    """A measure of a task over seeds, with * where it is surely off the dense model's."""
    if not rows:
        return ""
    value, difference = (
        sum(row[key] for row in rows) / len(rows) for key in ("second", "difference")
    )
    error = _error(rows)
    is_real = not math.isnan(error) and difference != 0 and abs(difference) >= NOISE * error
    return _value(rows[0], value) + "*" * is_real


def _value(row: Row, value: float) -> str:
    return share_word(value) if is_share(row) else f"{value:.4g}"


def share_word(value: float) -> str:
    """A share in percent without the sign, "" if it is nan."""
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def difference_word(line: Answers) -> str:
    """How far the mean is off the dense model's, in points, with its error."""
    if math.isnan(line.lost):
        return ""
    return f"{-100 * line.lost:+.1f}" + (
        "" if math.isnan(line.error) else f" ± {100 * line.error:.1f}"
    )
