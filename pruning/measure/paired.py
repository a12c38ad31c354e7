"""Two models on the same documents: the difference, its error, and what changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

NOISE = 2.0  # standard errors of a difference that mean nothing
# Measures of all documents together: log-likelihoods over words, bytes or documents, and how
# much a measure grows with that quotient.
SLOPES = {
    "bits_per_byte": lambda value: -1 / math.log(2),
    "byte_perplexity": lambda value: -value,
    "word_perplexity": lambda value: -value,
    "perplexity": lambda value: -value,
}


@dataclass(frozen=True)
class Paired:
    """A measure of a task under two models.

    Attributes:
      task: name.
      metric: as the harness has it, such as "acc,none" with the name of a filter.
      shots: examples before every question; None for a group of tasks that differ.
      documents: how many both answered; 0 where it is not known how they make the measure.
      first, second: its value under each model.
      first_error, second_error: their standard errors, None where the harness knows none.
      difference: second less first.
      error: standard error of the difference, from the differences of single documents; None
        under two.
      gained, lost: documents that only the second model, or only the first, has right; None where
        answers are not right or wrong.
      p: of McNemar's exact test, that so unequal a `gained` and `lost` are chance.
    """

    task: str
    metric: str
    shots: int | None
    documents: int
    first: float
    second: float
    first_error: float | None
    second_error: float | None
    difference: float
    error: float | None = None
    gained: int | None = None
    lost: int | None = None
    p: float | None = None

    @property
    def is_noise(self) -> bool | None:
        """Whether the difference is within noise; None where its error is not known."""
        if self.error is None:
            return None
        return self.difference == 0 or abs(self.difference) < NOISE * self.error

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "within_noise": self.is_noise}


def compare_results(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Paired]:
    """Set two results of the harness against each other.

    Args:
      first: with "results" and "samples", of the model that is the reference.
      second: the same of the other, on the same tasks.

    Returns:
      A row for every task and metric, groups of tasks included.
    """
    return [
        _paired(task, name, first, second)
        for task, values in second["results"].items()
        for name, value in values.items()
        if "," in name and "_stderr," not in name
        and _is_number(value, first["results"].get(task, {}).get(name))
    ]  # fmt: skip


def mcnemar(gained: int, lost: int) -> float:
    """Probability, of both sides, that so many of `gained + lost` fair coins fall alike."""
    count, least = gained + lost, min(gained, lost)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**count)


def _paired(task: str, name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> Paired:
    said = [found["results"][task] for found in (first, second)]
    errors = [some.get(name.replace(",", "_stderr,", 1)) for some in said]
    known = [float(error) if _is_number(error) else None for error in errors]
    one, two = (float(some[name]) for some in said)  # some measures are numbers of numpy
    shots = second.get("n-shot", {}).get(task)
    plain = Paired(
        task=task,
        metric=name,
        shots=shots if type(shots) is int else None,
        documents=0,
        first=one,
        second=two,
        first_error=known[0],
        second_error=known[1],
        difference=two - one,
    )
    ours = [_by_document(found.get("samples", {}).get(task, ()), name) for found in (first, second)]
    both = sorted(ours[0].keys() & ours[1].keys())
    values = [np.array([found[document] for document in both], float) for found in ours]
    metric = name.partition(",")[0]
    before, after = _shares(metric, one, values[0]), _shares(metric, two, values[1])
    if before is None or after is None:
        return plain
    more: dict[str, Any] = {}
    if len(both) > 1:
        more["error"] = float((after - before).std(ddof=1) / math.sqrt(len(both)))
    if np.isin(values, (0, 1)).all():
        gained, lost = int((after > before).sum()), int((after < before).sum())
        more |= {"gained": gained, "lost": lost, "p": mcnemar(gained, lost)}
    return replace(plain, documents=len(both), **more)


def _shares(metric: str, value: float, found: np.ndarray) -> np.ndarray | None:
    """Numbers of documents [n] whose mean is a measure and whose spread is, to first order, its
    own; None where it is not known how the measure is made of [n] or [n, 2]."""
    if not len(found):
        return None
    if metric in SLOPES and found.ndim <= 2:
        total, weight = found.T if found.ndim == 2 else (found, np.ones(len(found)))
        rest = total - weight * (total.sum() / weight.sum())
        return value + SLOPES[metric](value) * rest / weight.mean()
    return found if found.ndim == 1 and math.isclose(found.mean(), value) else None


def _by_document(samples: Sequence[Mapping[str, Any]], name: str) -> dict[Any, Any]:
    """What a metric says of every document: a number, or a sum and its weight."""
    metric, _, kind = name.partition(",")
    found = {s["doc_id"]: s[metric] for s in samples if s["filter"] == kind and metric in s}
    pairs = all(isinstance(one, tuple | list) and len(one) == 2 for one in found.values())
    numbers = [part for one in found.values() for part in (one if pairs else (one,))]
    return found if _is_number(*numbers) else {}


def _is_number(*values: Any) -> bool:
    return all(isinstance(v, int | float | np.number) and math.isfinite(v) for v in values)
