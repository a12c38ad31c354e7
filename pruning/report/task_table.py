"""Tasks of a compressed model beside those of the dense one, as a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from pruning.report.table import TextTable


def compared_table(model: str, rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """A model's tasks beside those of the dense one."""
    shown, before = [], ""
    for row in rows:
        changed = row["gained"] is not None
        said = {None: "", True: "within noise", False: "yes"}[row["within_noise"]]
        shown.append([
            "" if row["task"] == before else row["task"], row["metric"].removesuffix(",none"),
            f"{row['documents']:,}" if row["documents"] else "",
            _with_error(row["first"], row["first_error"]),
            _with_error(row["second"], row["second_error"]),
            _with_error(row["difference"], row["error"], "+"),
            f"{row['gained'] + row['lost']:,} (+{row['gained']:,} -{row['lost']:,})"
            if changed else "",
            "" if row["p"] is None else f"{row['p']:.2g}", said,
        ])  # fmt: skip
        before = row["task"]
    header = ["task", "metric", "documents", "dense", model, "difference", "flipped",
              "McNemar p", "real?"]  # fmt: skip
    note = (
        "± one standard error; that of a difference is of the same documents under both models. "
        "Within noise: less than two. Flipped: answers that only this model (+) or only the dense "
        "one (-) has right; p: that so unequal a number of both is chance."
    )
    return TextTable(f"{model} beside the dense model", header, shown, note)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")
