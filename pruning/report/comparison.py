"""The results of a comparison: its file, its ranking, its tables."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from pruning.kit.fitting import misfits
from pruning.kit.words import percent
from pruning.report.compared import COPIES, MERGED, UNPRUNED, Line, Result
from pruning.report.html import section_html
from pruning.report.table import TextTable
from pruning.text.held_out import not_held_out

MEASURED = {"nll", "kl", "top1", "tokens"}
SHARES = ("÷ random", "KL", "top-1")  # columns after the added nats
SIZES = ("bytes", "parameters", "active", "active_bytes")  # of which a line has the mean
EXPENDABLE = ("top-1", "KL")  # columns that a narrow terminal leaves out, in turn


class _Stored(TypedDict):
    """What compare.json holds, see `Comparison`."""

    key: dict[str, Any]
    dense: dict[str, dict[str, float | None]]
    results: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    sizes: NotRequired[dict[str, int]]
    seen: NotRequired[dict[str, float | None]]
    asked: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """All results on one model with one set of texts.

    Attributes:
      key: what results depend on: model, texts, sizes.
      dense: quality of the dense model by text.
      results: of rules that could keep the budget.
      refused: the others, each with a reason.
      sizes: bytes of 16-bit weights, "dense" of the whole model and "experts" of its routed
        experts; empty in a file of an earlier version.
      seen: by text, see `held_out.seen_shares`; empty in a file of an earlier version.
      asked: which tasks of lm-evaluation-harness, with how many examples and documents.
    """

    key: dict[str, Any]
    dense: dict[str, dict]
    results: tuple[Result, ...]
    refused: tuple[Result, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    seen: dict[str, float | None] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Comparison":
        """Read compare.json.

        Raises:
          InputError: it is damaged.
        """
        try:
            found = read_json(path)
            if wrong := misfits(_Stored, found):
                raise InputError(f"{', '.join(wrong)} hold something else")
            if any(misfits(Result, one) for one in (*found["results"], *found["refused"])):
                raise InputError("a result holds something else")
            measured = [found["dense"], *(result["quality"] for result in found["results"])]
            texts = [one for by_text in measured for one in by_text.values()]
            if (
                not found["dense"]
                or any(by_text.keys() != found["dense"].keys() for by_text in measured)
                or any(not MEASURED <= one.keys() or one["nll"] is None for one in texts)
                or found.get("sizes", {}).keys() not in (set(), {"dense", "experts"})
            ):
                raise InputError("a result lacks what was measured")
            parts: Any = {n: tuple(Result(**r) for r in found[n]) for n in ("results", "refused")}
            return cls(**found | parts)
        except (ValueError, KeyError, TypeError) as error:
            told = str(error)[:1000]
            raise InputError(f"{path} is damaged ({told}); remove it and compare again") from None

    def save(self, folder: Path) -> None:
        """Write compare.json and compare.csv, each whole or not at all."""
        replace_text(folder / "compare.json", json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        replace_text(folder / "compare.csv", self.csv())

    def _repr_html_(self) -> str:
        return section_html(self.table())

    def with_results(self, results: Iterable[Result], refused: Iterable[Result]) -> "Comparison":
        """With more results.

        Raises:
          InputError: the rules at a rate that was asked for do not all keep the same number of
            channels.
        """
        every = (*self.results, *results)
        asked = [result for result in every if not result.target]
        for rate in {result.rate for result in asked}:
            kept = {result.kept for result in asked if result.rate == rate}
            if len(kept) > 1:
                raise InputError(f"budgets at prune rate {rate} differ: {sorted(kept)}")
        return dataclasses.replace(self, results=every, refused=(*self.refused, *refused))

    def with_tasks(self, asked: Result, rows: list[dict[str, Any]]) -> "Comparison":
        """With what tasks showed of one of its results."""
        results = tuple(
            dataclasses.replace(one, tasks=rows) if one is asked else one for one in self.results
        )
        return dataclasses.replace(self, results=results)

    def only(self, wanted: Callable[[Result], bool]) -> "Comparison":
        """The part that was asked for."""
        parts = {n: tuple(filter(wanted, getattr(self, n))) for n in ("results", "refused")}
        return dataclasses.replace(self, **parts)

    @property
    def rates(self) -> list[float]:
        """Prune rates that were asked for, rising."""
        every = (*self.results, *self.refused)
        return sorted({r.rate for r in every if not r.target and r.rule != UNPRUNED})

    @property
    def targets(self) -> list[int]:
        """Sizes in bytes that were asked for, rising."""
        return sorted({r.target for r in (*self.results, *self.refused) if r.target})

    @property
    def bits(self) -> list[int]:
        """Bits of the weights, rising."""
        return sorted({result.bits for result in (*self.results, *self.refused)})

    @property
    def of_copies(self) -> str:
        """What sizes of merged experts leave out; empty if none were merged."""
        return COPIES if any(result.family == MERGED for result in self.results) else ""

    def lines(self) -> list[Line]:
        """Every rule at every rate with a result, the least loss at each rate first."""
        pruned = (r for r in self.results if not r.target and r.rule != UNPRUNED)
        return self._lines(r for r in pruned if r.is_of_text)

    def points(self) -> list[Line]:
        """The same with rules at sizes, and with fewer bits alone."""
        return self._lines(r for r in self.results if r.is_of_text and not r.has_fewer)

    def fewer(self) -> list[Line]:
        """The model with fewer experts for each token, the least loss first."""
        return self._lines(r for r in self.results if r.has_fewer)

    def _lines(self, results: Iterable[Result]) -> list[Line]:
        groups: dict[tuple[str, float, int], list[Result]] = {}
        for result in results:
            groups.setdefault((result.name, result.rate, result.target), []).append(result)
        found = []
        for (_, rate, target), group in groups.items():
            chance = Result("random", rate, bits=group[0].bits).name
            found.append(self._line(group, groups.get((chance, rate, target), ())))
        return sorted(found, key=lambda line: (line.rate, line.added))

    def added(self, group: Sequence[Result]) -> list[float]:
        """Nats per token above the dense model of each result, texts with equal weight."""
        return [
            float(np.mean([q["nll"] - self.dense[t]["nll"] for t, q in result.quality.items()]))
            for result in group
        ]

    def _line(self, group: Sequence[Result], random: Sequence[Result]) -> Line:
        added = self.added(group)
        chance = float(np.mean(self.added(random))) if random else math.nan
        mean = {
            name: float(np.mean([[q[name] for q in r.quality.values()] for r in group]))
            for name in ("kl", "top1")
        }
        return Line(
            group[0].name,
            group[0].rate,
            added=float(np.mean(added)),
            of_random=float(np.mean(added)) / chance if chance > 0 else math.nan,
            spread=float(np.ptp(added)) / 2,
            kl=mean["kl"],
            top1=mean["top1"],
            emptied=float(np.mean([result.emptied for result in group])),
            family=group[0].family,
            about=group[0].about,
            bits=group[0].bits,
            target=group[0].target,
            has_fewer=group[0].has_fewer,
            **{name: float(np.mean([getattr(one, name) for one in group])) for name in SIZES},
        )

    def ranked(self) -> list[str]:
        """Rules by their loss at the first rate, those without one by the next."""
        order: dict[str, None] = {}
        for line in self.lines():
            order.setdefault(line.rule)
        return list(order)

    def table(self) -> TextTable:
        """Added nats, KL divergence and agreement of every rule at every rate."""
        lines = {(line.rule, line.rate): line for line in self.lines()}
        header = ["", "rule"]
        for rate in self.rates:
            header += [f"+nats {rate:.4g}", *SHARES]
        rows = []
        for place, rule in enumerate(self.ranked(), 1):
            row = [str(place), rule]
            for rate in self.rates:
                row += _cells(lines.get((rule, rate)))
            rows.append(row)
        return TextTable("Rules, best first", header, rows, self._note())

    def rate_table(self, rate: float) -> TextTable:
        """The rules at one rate, best first, and what they are."""
        rows = [
            [str(place), line.rule, *_cells(line), line.about]
            for place, line in enumerate((x for x in self.lines() if x.rate == rate), 1)
        ]
        title = f"Rules at prune rate {rate:.4g}, best first"
        header = ["", "rule", "+nats", *SHARES, "what it is"]
        return TextTable(title, header, rows, self._note())

    def _note(self) -> str:
        tokens = sum(text["tokens"] for text in self.dense.values())
        note = (
            f"Mean over {len(self.dense)} texts, {tokens:,} tokens in all. +nats: loss per token "
            "above the dense model; ÷ random: divided by the loss that random channels add; KL: "
            "nats per token from the dense model; top-1: how often both prefer the same token. "
            f"All rules keep the same number of channels; -: the rule cannot. {self.of_copies}"
        ).rstrip()
        return f"{not_held_out(self.seen)} {note}".lstrip()

    def csv(self) -> str:
        """One row per rule, rate, seed and text, for spreadsheets."""
        buffer = io.StringIO()
        out = csv.writer(buffer, lineterminator="\n")
        out.writerow(["rule", "family", "rate", "seed", "kept", "emptied", "text", "tokens", "nll",
                      "added", "kl", "top1", "repair", "bits", "target", "bytes",
                      "draw", "overlap", "top_k", "skip_below", "calibration", "parameters",
                      "active", "active_bytes", "cut"])  # fmt: skip
        for r in self.results:
            what = [r.rule, r.family, r.rate, r.seed, r.kept, r.emptied]
            for text, q in r.quality.items():
                added = q["nll"] - self.dense[text]["nll"]
                out.writerow([*what, text, q["tokens"], q["nll"], added, q["kl"], q["top1"],
                              r.repair, r.bits, r.target, r.bytes, r.draw, r.overlap, r.top_k,
                              r.skip_below, r.calibration, r.parameters, r.active,
                              r.active_bytes, int(r.cut)])  # fmt: skip
        return buffer.getvalue()

    def terminal_table(self, width: int = 80) -> Table:
        """The table for a terminal so many columns wide; a narrow one leaves columns out."""
        table = self.table()
        shown = Table(
            title=table.title, caption=table.note, title_justify="left", title_style="bold",
            caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        columns = _fitting(table, width)
        for name, _ in columns:
            rule = name == "rule"
            shown.add_column(name, justify="left" if rule else "right", no_wrap=rule)
        for row in table.rows:
            shown.add_row(*(escape(row[column]) for _, column in columns))
        return shown


def _fitting(table: TextTable, width: int) -> list[tuple[str, int]]:
    # Names and places of the columns that are shown, so that no number wraps.
    columns = list(zip(table.header, range(len(table.header)), strict=True))
    needed = [max(map(len, cells)) + 2 for cells in zip(table.header, *table.rows, strict=True)]
    for name in EXPENDABLE:
        if sum(needed[column] for _, column in columns) <= width:
            break
        columns = [(shown, column) for shown, column in columns if shown != name]
    return columns


def _cells(line: Line | None) -> list[str]:
    if line is None:
        return ["-", "-", "-", "-"]
    spread = f" ±{line.spread:.3f}" if line.spread else ""
    of_random = "-" if math.isnan(line.of_random) else f"{line.of_random:.2f}"
    return [f"{line.added:.4f}{spread}", of_random, f"{line.kl:.4f}", percent(line.top1)]
