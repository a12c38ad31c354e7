"""Errors over draws of the calibration text, by hand."""

import math

import pytest

from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.comparison_draws import Spread, draw_tables, draws_at

# Rule -> draw -> (added nats, overlap) of each seed; draw 0 is the text itself.
MEASURED = {
    "best": {0: [(0.9, 1.0)], 1: [(0.10, 0.8)], 2: [(0.20, 0.9)], 3: [(0.30, 0.7)]},
    "near": {0: [(0.0, 1.0)], 1: [(0.15, 0.6)], 2: [(0.19, 0.6)], 3: [(0.35, 0.6)]},
    "far": {0: [(0.5, 1.0)], 1: [(0.50, 0.5)], 2: [(0.61, 0.5)], 3: [(0.69, 0.5)]},
    "random": {1: [(1.0, 0.2), (2.0, 0.4)], 2: [(1.5, 0.3), (1.5, 0.3)],
               3: [(2.0, 0.3), (1.0, 0.3)]},
    "unfinished": {1: [(0.0, 1.0)]},
}  # fmt: skip


def comparison() -> Comparison:
    dense = {"t": {"nll": 2.0, "tokens": 10, "kl": None, "top1": None}}
    results = tuple(
        Result(rule, 0.5, seed, draw=draw, overlap=alike,
               quality={"t": {"nll": 2 + nats, "tokens": 10, "kl": 0.1, "top1": 0.5}})
        for rule, draws in MEASURED.items()
        for draw, seeds in draws.items()
        for seed, (nats, alike) in enumerate(seeds)
    )  # fmt: skip
    return Comparison({}, dense, results, ())


def test_a_mean_has_the_standard_error_of_its_values():
    found = Spread.of([0.1, 0.2, 0.6])
    mean = 0.3
    variance = ((0.1 - mean) ** 2 + (0.2 - mean) ** 2 + (0.6 - mean) ** 2) / 2
    assert found.mean == pytest.approx(mean) and found.error == pytest.approx(
        math.sqrt(variance / 3)
    )
    assert found.is_noise is (mean < 2 * math.sqrt(variance / 3))
    assert not Spread(-0.3, 0.1).is_noise and Spread(-0.19, 0.1).is_noise
    assert str(Spread(0.12346, 0.01)) == "0.1235 ±0.0100"


def test_rules_are_compared_on_the_same_draws():
    rows = {row.rule: row for row in draws_at(comparison(), "0.5")}
    assert list(rows) == ["best", "near", "far", "random"]  # by their means; all draws or none
    assert rows["best"].added.mean == pytest.approx(0.2)
    assert rows["best"].behind == Spread(0.0, 0.0)
    assert rows["best"].overlap.mean == pytest.approx(0.8)
    near = rows["near"].behind  # +0.05, -0.01, +0.05
    assert near.mean == pytest.approx(0.03)
    assert near.error == pytest.approx(math.sqrt((2 * 0.02**2 + 0.04**2) / 2 / 3))
    assert near.is_noise and not rows["far"].behind.is_noise
    assert rows["far"].behind.mean == pytest.approx(0.4)
    # Seeds of one draw are one value.
    assert rows["random"].added == Spread(pytest.approx(1.5), pytest.approx(0.0))
    assert rows["random"].overlap.mean == pytest.approx(0.3)
    assert draws_at(comparison(), "0.25") == draws_at(comparison(), "0.75") == []


def test_what_is_within_noise_of_the_best_is_marked():
    (table,) = draw_tables(comparison())
    assert table.title == "Over 3 draws of the calibration text, at 0.5"
    assert [(row[0], row[4]) for row in table.rows] == [
        ("best", ""), ("near", "noise"), ("far", ""), ("random", ""),
    ]  # fmt: skip
    assert table.rows[0][1] == "0.2000 ±0.0577" and table.rows[0][3] == ""
    assert table.rows[1][3] == "0.0300 ±0.0200"
    lines = comparison().lines()
    assert {line.rule: round(line.added, 6) for line in lines} == {
        "near": 0.0, "far": 0.5, "best": 0.9
    }  # fmt: skip
