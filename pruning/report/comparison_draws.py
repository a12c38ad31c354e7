"""What chance in the calibration text does to a comparison: errors over draws of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.table import TextTable

ERRORS = 2.0  # standard errors beyond which a difference is more than noise
NOTE = (
    "Each draw is as many windows of the calibration text, with replacement, scored and planned "
    "for. ± is the standard error of the mean over draws, of a few draws itself a rough one. kept "
    "alike: Jaccard index of what is kept by a draw and by the text itself. behind the best: mean "
    "difference on the same draws; noise: less than two of its standard errors."
)


@dataclass(frozen=True)
class Spread:
    """A mean over draws.

    Attributes:
      mean: of the values.
      error: standard error of the mean, from the spread of the values.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of two values at least."""
        return cls(float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values))))

    @property
    def is_noise(self) -> bool:
        """Whether it differs from zero by less than chance does."""
        return abs(self.mean) < ERRORS * self.error

    def __str__(self) -> str:
        return f"{self.mean:.4f} ±{self.error:.4f}"


@dataclass(frozen=True)
class Drawn:
    """One rule over the draws.

    Attributes:
      rule: `Result.name`.
      added: nats per token above the dense model.
      overlap: share of what is kept that is so whatever the draw, as of results.
      behind: nats per token that it loses more than the best on the same draws; zero of the best.
    """

    rule: str
    added: Spread
    overlap: Spread
    behind: Spread


def draws_at(found: Comparison, place: str) -> list[Drawn]:
    """Rules that were measured on all draws at a rate or a size, the best mean first."""
    groups: dict[str, dict[int, list[Result]]] = {}
    for result in found.results:
        if result.draw and result.place == place:
            groups.setdefault(result.name, {}).setdefault(result.draw, []).append(result)
    draws = sorted({draw for one in groups.values() for draw in one})
    whole = {name: one for name, one in groups.items() if len(one) == len(draws) > 1}
    # Seeds of a random rule are one value for each draw.
    added = {n: [float(np.mean(found.added(one[d]))) for d in draws] for n, one in whole.items()}
    if not added:
        return []
    best = min(added, key=lambda name: float(np.mean(added[name])))
    rows = [
        Drawn(
            name,
            Spread.of(values),
            Spread.of([float(np.mean([r.overlap for r in whole[name][d]])) for d in draws]),
            Spread.of([own - other for own, other in zip(values, added[best], strict=True)]),
        )
        for name, values in added.items()
    ]
    return sorted(rows, key=lambda row: row.added.mean)


def draw_tables(found: Comparison) -> list[TextTable]:
    """A table for each rate and size that was measured on draws of the calibration text."""
    places = dict.fromkeys(result.place for result in found.results if result.draw)
    header = ["rule", "+nats", "kept alike", "behind the best", ""]
    tables = []
    for place in places:
        best, *others = draws_at(found, place)
        rows = [[best.rule, str(best.added), str(best.overlap), "", ""]]
        rows += [
            [x.rule, str(x.added), str(x.overlap), str(x.behind), "noise" * x.behind.is_noise]
            for x in others
        ]
        count = len({result.draw for result in found.results if result.draw})
        title = f"Over {count} draws of the calibration text, at {place}"
        tables.append(TextTable(title, header, rows, NOTE))
    return tables
