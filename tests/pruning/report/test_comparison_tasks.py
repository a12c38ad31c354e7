"""What models answer, in rows by hand."""

import csv
import math

import pytest

from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.comparison_page import comparison_page
from pruning.report.comparison_tasks import answered, plot_tasks, task_tables, tasks_csv
from pruning.report.drawing import GREY


def row(task: str, metric: str, first: float, second: float, error: float | None) -> dict:
    return {
        "task": task, "metric": f"{metric},none", "shots": 0, "documents": 100, "first": first,
        "first_error": 0.05, "second": second, "second_error": 0.05, "difference": second - first,
        "error": error, "gained": 3, "lost": 7, "p": 0.34, "within_noise": False,
    }  # fmt: skip


def rows(arc: float, sums: float) -> list[dict]:
    return [
        row("arc", "acc", 0.7, 0.1, 0.03), row("arc", "acc_norm", 0.8, arc, 0.03),
        row("sums", "exact_match", 0.4, sums, 0.04), row("text", "byte_perplexity", 3.0, 4.5, 0.1),
        {**row("both", "acc_norm", 0.6, 0.1, 0.01), "documents": 0},  # a group of tasks
    ]  # fmt: skip


# rule, seed, rate, bits, bytes, arc, sums
MEASURED = [
    ("smart", 0, 0.5, 16, 5_000_000, 0.74, 0.36),
    ("smart", 0, 0.5, 4, 2_000_000, 0.76, 0.30),
    ("random", 0, 0.5, 16, 5_000_000, 0.30, 0.10),
    ("random", 1, 0.5, 16, 5_000_000, 0.40, 0.10),
]


@pytest.fixture
def found() -> Comparison:
    quality = {"t": {"nll": 1.0, "tokens": 9, "kl": 0.1, "top1": 0.5}}
    results = tuple(
        Result(rule, rate, seed, bits=bits, kept=4, bytes=size, quality=quality, tasks=rows(*seen))
        for rule, seed, rate, bits, size, *seen in MEASURED
    )
    unasked = Result("smart", 0.25, kept=6, bytes=7_000_000, quality=quality)
    dense = {"t": {"nll": 0.0, "tokens": 9, "kl": None, "top1": None}}
    sizes = {"dense": 10_000_000, "experts": 8_000_000}
    return Comparison({}, dense, (*results, unasked), (), sizes)


def test_a_task_counts_by_its_best_kind_of_right_answers_and_seeds_by_their_mean(found):
    best, worst, small = answered(found)
    assert [line.first.name for line in (best, worst, small)] == ["smart", "random", "smart 4-bit"]
    assert best.mean == pytest.approx((0.74 + 0.36) / 2)
    assert best.lost == pytest.approx((0.06 + 0.04) / 2)
    assert best.error == pytest.approx(math.hypot(0.03, 0.04) / 2) and not best.is_noise
    assert worst.mean == pytest.approx((0.35 + 0.10) / 2)
    assert worst.error == best.error  # other seeds are asked the same


def test_the_table_has_a_column_for_each_task_and_marks_what_is_no_noise(found):
    (table,) = task_tables(found)
    assert table.header == ["rule", "bits", "pruned", "MB", "factor", "arc", "sums", "text", "mean",
                            "difference", "real?"]  # fmt: skip
    assert table.rows == [
        ["dense", "16", "", "10.0", "1.00", "80.0", "40.0", "3", "60.0", "", ""],
        ["smart", "16", "50.0%", "5.0", "2.00", "74.0*", "36.0", "4.5*", "55.0", "-5.0 ± 2.5",
         "yes"],
        ["random", "16", "50.0%", "5.0", "2.00", "35.0*", "10.0*", "4.5*", "22.5", "-37.5 ± 2.5",
         "yes"],
        ["smart 4-bit", "4", "50.0%", "2.0", "5.00", "76.0", "30.0*", "4.5*", "53.0", "-7.0 ± 2.5",
         "yes"],
    ]  # fmt: skip
    near = found.with_tasks(found.results[0], rows(0.78, 0.38))
    assert task_tables(near)[0].rows[1][5:] == ["78.0", "38.0", "4.5*", "58.0", "-2.0 ± 2.5",
                                                "within noise"]  # fmt: skip


def test_perplexities_alone_are_shown_and_have_no_mean(found):
    bare = found.with_tasks(found.results[0], [row("text", "byte_perplexity", 3.0, 4.5, None)])
    cells = next(one for one in task_tables(bare)[0].rows if one[0] == "smart")
    assert cells[5:] == ["", "", "4.5", "", "", ""]
    words = bare.only(lambda one: one is bare.results[0])
    assert not plot_tasks(words).axes[0].collections


def test_the_figure_joins_what_answers_best_at_each_size(found):
    (axes,) = plot_tasks(found).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["16 bits"] == [[5.0, pytest.approx(55)]]
    assert lines["4 bits"] == [[2.0, pytest.approx(53)]]
    dense = [line.get_xydata().tolist() for line in axes.get_lines() if line.get_color() == GREY]
    assert dense == [[[0, pytest.approx(60)], [1, pytest.approx(60)]], [[10, pytest.approx(60)]]]
    bars = [bar.tolist() for one in axes.collections for bar in one.get_segments()]
    assert bars == [
        [[size, pytest.approx(mean - 2.5)], [size, pytest.approx(mean + 2.5)]]
        for size, mean in ((5, 55), (5, 22.5), (2, 53))
    ]
    said = [(one.get_text(), one.xy) for one in axes.texts]
    assert said == [("smart", (5, pytest.approx(55))), ("smart", (2, pytest.approx(53)))]
    assert "What the models still answer" in comparison_page(found)


def test_the_file_has_a_line_for_each_plan_task_and_metric(found):
    table = list(csv.DictReader(tasks_csv(found).splitlines()))
    assert len(table) == 4 * 5
    assert table[1]["metric"] == "acc_norm,none"
    picked = {name: table[1][name] for name in ("rule", "bits", "dense", "value", "difference")}
    assert picked == {"rule": "smart", "bits": "16", "dense": "0.8", "value": "0.74",
                      "difference": str(0.74 - 0.8)}  # fmt: skip
