"""Tables of strings, and the one that says how a plan spent its budget."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruning.report.compression import CompressionReport

NAMED = 12  # experts or channels named in a table; report.json has them all


@dataclass(frozen=True)
class TextTable:
    """A titled table of strings; a row that starts with "" belongs to the row above.

    Attributes:
      title: a word or two.
      header: column names.
      rows: cells.
      note: how to read it, one sentence.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers only, which people compare by their last digits."""
        cells = [row[column] for row in self.rows]
        return any(cells) and all(re.fullmatch(r"[-+\d.,%]*", cell) for cell in cells)


POLICIES = {
    "free": "every expert has a width of its own",
    "capped": "every expert has a width of its own, up to --cap",
    "layer": "the experts of a layer have one width",
    "uniform": "all experts of the model have one width",
    "experts": "experts go whole or stay whole",
    "combined": "some experts go whole, others lose channels",
}


def allocation_table(report: "CompressionReport") -> TextTable:
    """Parameters; coverage of the planner, its aligned widths and the optimum; unusual experts."""
    plan = report.plan
    policy = str(plan.get("width", "free"))
    rows = [*_parameters(report), ["width policy", policy, POLICIES.get(policy, "")]]
    if "coverage_optimum" in plan:
        before, aligned, optimum = (
            plan[f"coverage_{name}"] for name in ("before", "aligned", "optimum")
        )
        rows += [
            ["coverage wanted", f"{before:.4f}", "before widths became whole blocks"],
            ["coverage reached", f"{aligned:.4f}", f"alignment {plan.get('align', 'paper')!r}"],
            ["coverage of the optimum", f"{optimum:.4f}", "best free widths in whole blocks"],
            ["gap to the optimum", f"{optimum - aligned:.4f}", "of the weighted score"],
        ]
    starved = plan.get("starved_experts", [])
    share = plan.get("starved_share", 0.0)
    named = ", ".join(f"{layer}.{expert}" for layer, expert in starved[:NAMED])
    more = f" and {len(starved) - NAMED} more" if len(starved) > NAMED else ""
    channels = plan.get("super_channels", [])
    shown = ", ".join(".".join(map(str, one)) for one in channels[:NAMED])
    rows += [
        ["emptied experts", str(plan.get("emptied_experts", 0)), "keep no channel"],
        ["harmful experts", str(plan.get("harmful_experts", 0)), "negative attribution"],
        ["starved experts", str(len(starved)),
         f"fewer than 32 routed tokens, {share:.1%} of all; {named or 'none'}{more}"],
        ["super-channels", str(len(channels)),
         f"{plan.get('super_channels_removed', 0)} of them removed; {shown or 'none'}"],
    ]  # fmt: skip
    note = (
        "Coverage: share of the channel score that is kept, experts weighted as the planner does. "
        "Super-channels have a score or energy above 1000 times their layer's median and 1% of its "
        "total; they are kept wherever the width policy allows. Named by layer.expert(.channel)."
    )
    return TextTable("Allocation", ["what", "value", "detail"], rows, note)


def _parameters(report: "CompressionReport") -> list[list[str]]:
    left = min(size["parameters"] for size in report.sizes["exports"].values())
    whole = report.model["parameters"]
    rows = [["parameters", _millions(left), f"of {_millions(whole)}"]]
    if active := report.sizes.get("active_parameters"):  # unknown to earlier versions
        met = f"of {_millions(active['source'])} that a token meets on average"
        rows.append(["active parameters", _millions(active["exports"]), met])
    return rows


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"
