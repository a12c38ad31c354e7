"""Tasks of a compressed model beside those of the dense one, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from pruning.report.html import render
from pruning.report.table import TextTable


def compared_table(model: str, rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """A model's tasks beside those of the dense one."""
    shown, before = [], ""
    for row in rows:
        changed = row["gained"] is not None
        said = {None: "", True: "within noise", False: "yes"}[row["within_noise"]]
        shown.append([
            "" if row["task"] == before else row["task"], row["metric"].removesuffix(",none"),
            "" if row["shots"] is None else str(row["shots"]),
            f"{row['documents']:,}" if row["documents"] else "",
            _with_error(row["first"], row["first_error"]),
            _with_error(row["second"], row["second_error"]),
            _with_error(row["difference"], row["error"], "+"),
            f"{row['gained'] + row['lost']:,} (+{row['gained']:,} -{row['lost']:,})"
            if changed else "",
            "" if row["p"] is None else f"{row['p']:.2g}", said,
        ])  # fmt: skip
        before = row["task"]
    header = ["task", "metric", "shots", "documents", "dense", model, "difference", "flipped",
              "McNemar p", "real?"]  # fmt: skip
    note = (
        "Asked by lm-evaluation-harness; shots: examples before each question. "
        "± one standard error; that of a difference is of the same documents under both models. "
        "Within noise: less than two. Flipped: answers that only this model (+) or only the dense "
        "one (-) has right; p: that so unequal a number of both is chance."
    )
    return TextTable(f"{model} beside the dense model", header, shown, note)


def card_section(model: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as a section of a model card, in Markdown."""
    return render("tasks.md", shown=compared_table(model, rows))


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
