"""The paper's tables and page, of results by hand."""

import csv
import io
from typing import Any

import pytest

from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.drawing import GREY
from pruning.report.paper import Method, Paper, Timed, best_of, labelled
from pruning.report.paper_page import paper_page, plot_blocks, plot_rates
from tests.pruning.report.test_comparison_tasks import row

TEXT = {"tokens": 9, "kl": 0.25, "top1": 0.5}
DENSE = 1_000_000  # weights


def result(rule: str, rate: float, nll: float, bits: int = 16, arc: float = 0.0, **more) -> Result:
    left = round(DENSE * (1 - rate))
    tasks = [row("arc", "acc", 0.8, arc, 0.02), row("text", "byte_perplexity", 3.0, 4.5, 0.1)]
    return Result(rule, rate, bits=bits, quality={"t": {"nll": nll, **TEXT}}, parameters=left,
                  bytes=left * bits // 8 + 1000, tasks=tasks if arc else [], **more)  # fmt: skip


def paper(results: list[Result], recovered: list[Result] = [], **more) -> Paper:  # noqa: B006
    dense = {"t": {"nll": 1.0, "tokens": 9, "kl": None, "top1": None}}
    refused = (Result("uniform-act", 0.5, reason="too narrow"),)
    pruned = Comparison({}, dense, tuple(results), refused, {"dense": 2 * DENSE, "experts": 1})
    trained = Comparison({}, dense, tuple(recovered), (), pruned.sizes) if recovered else None
    methods = labelled(("uniform-act", "auto", "experts-b"), "experts-b", "layer")
    told = {"moe-jax": "1", "device": "abacus", "date": "then", "model": "m", "layer": 7,
            "timed_tokens": 2048, "repeats": 3}  # fmt: skip
    return Paper(pruned, trained, methods, "dora", more.pop("timed", ()), {**told, **more})


def axes_of(figure: Any) -> list[Any]:
    return figure.axes


def places(line: Any) -> list[tuple[float, float]]:
    return [(round(x, 6), round(y, 6)) for x, y in line.get_xydata().tolist()]


RESULTS = [
    result("experts-b", 0.5, 2.5, arc=0.6), result("auto", 0.5, 1.75, 4, arc=0.7, repair="layer"),
    result("auto", 0.5, 1.5, arc=0.79, repair="layer"), result("unpruned", 0.0, 1.125, 4, arc=0.8),
    result("uniform-act", 0.25, 1.25, arc=0.75), result("other", 0.25, 9.0),
]  # fmt: skip


def test_a_row_for_each_method_rate_and_format_the_whole_model_first():
    table, trained = paper(RESULTS, [result("auto", 0.5, 1.25, repair="layer")]).tables()
    assert table.header == ["method", "pruned", "bits", "arc", "text", "mean", "difference",
                            "real?", "+nats", "KL", "MB", "factor", "nominal"]  # fmt: skip
    assert [one[:3] for one in table.rows] == [
        ["whole model", "0.0%", "16"], ["whole model", "0.0%", "4"],
        ["uniform widths", "25.0%", "16"], ["ours", "50.0%", "16"],
        ["best expert removal", "50.0%", "16"], ["ours", "50.0%", "4"],
    ]  # fmt: skip
    assert table.rows[0][3:] == ["80.0 ± 5.0", "3 ± 0.05", "80.0", "", "", "0.0000", "0.0000",
                                 "2.0", "1.00", "1.00"]  # fmt: skip
    # 16 bits of 10**6 weights over 16 of half of them and a kilobyte; nominally without that.
    assert table.rows[3][3:] == [
        "79.0 ± 5.0", "4.5* ± 0.05", "79.0", "-1.0 ± 2.0", "within noise", "0.5000", "0.2500",
        "1.0", "2.00", "2.00",
    ]  # fmt: skip
    assert table.rows[5][3:] == ["70.0* ± 5.0", "4.5* ± 0.05", "70.0", "-10.0 ± 2.0", "yes",
                                 "0.7500", "0.2500", "0.3", "7.97", "8.00"]  # fmt: skip
    assert "Not possible: uniform-act at 0.5 (too narrow)." in table.note
    assert trained.title == "With recovery: dora"
    assert trained.header == ["method", "pruned", "bits", "+nats", "KL", "MB", "factor", "nominal"]
    assert [one[:4] for one in trained.rows] == [["ours", "50.0%", "16", "0.2500"]]


def test_spreadsheet_and_markdown_hold_the_same_rows():
    found = paper(RESULTS, [result("auto", 0.5, 1.25, repair="layer")])
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    said = [(one["method"], one["recovery"], one["bits"], one["measure"], one["value"])
            for one in rows if one["rule"] == "auto"]  # fmt: skip
    assert said == [
        ("ours", "", "16", "nll t", "1.5"), ("ours", "", "16", "arc acc,none", "0.79"),
        ("ours", "", "16", "text byte_perplexity,none", "4.5"),
        ("ours", "", "4", "nll t", "1.75"), ("ours", "", "4", "arc acc,none", "0.7"),
        ("ours", "", "4", "text byte_perplexity,none", "4.5"),
        ("ours", "dora", "16", "nll t", "1.25"),
    ]  # fmt: skip
    assert rows[-1]["bytes"] == "1001000" and rows[-1]["factor"] == "1.998"
    assert "| ours | 50.0% | 16 | 79.0 ± 5.0 | 4.5* ± 0.05 | 79.0 |" in found.markdown()
    assert "on abacus, begun then" in found.markdown()


def test_lines_of_figure_9_begin_at_the_whole_model_in_their_bits():
    judged = plot_rates(paper(RESULTS, RESULTS[2:3]))
    left, right = axes_of(judged)
    points = [places(line.lines[0]) for line in left.containers]
    assert sorted(points) == sorted([
        [(0, 80), (0.25, 75)], [(0, 80), (0.5, 79)], [(0, 80), (0.5, 70)], [(0, 80), (0.5, 60)],
    ])  # fmt: skip
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "uniform widths", "ours", "best expert removal",
    ]  # fmt: skip
    assert right.get_title(loc="left") == "With recovery"
    alone = paper([result("unpruned", 0.0, 1.125, 4), result("auto", 0.5, 1.5, 4)])
    (lost,) = axes_of(plot_rates(alone))
    assert places(lost.containers[0].lines[0]) == [(0, 0.125), (0.5, 0.5)]


def test_figure_10_has_a_line_for_each_rate_and_one_for_the_dense_layer():
    timed = (Timed(0, 0, (90, 80, 99), 4_000_000), Timed(0.5, 64, (60, 50, 80), 2_500_000),
             Timed(0.5, 1, (40, 35, 45), 2_000_000))  # fmt: skip
    found = paper(RESULTS, timed=timed)
    assert found.tables()[-1].rows == [
        ["dense", "", "90", "80 to 99", "4.0"], ["50.0%", "64", "60", "50 to 80", "2.5"],
        ["50.0%", "1", "40", "35 to 45", "2.0"],
    ]  # fmt: skip
    speed, memory = axes_of(plot_blocks(found))
    (dense,) = [line for line in speed.lines if line.get_color() == GREY]
    assert set(dense.get_ydata()) == {90}
    assert places(speed.containers[0].lines[0]) == [(1, 40), (64, 60)]
    assert places(memory.lines[-1]) == [(1, 2), (64, 2.5)]
    page = paper_page(found)
    assert page.count("<img") == 2 and "http" not in page and "Layer 7" not in page
    assert paper_page(paper(RESULTS)).count("<img") == 1


def test_best_loses_least_over_all_rates_in_the_most_bits_and_has_a_plan_at_each():
    results = [
        result("a", 0.25, 1.1), result("a", 0.5, 1.9), result("a", 0.25, 0.1, 4),
        result("b", 0.25, 1.2), result("b", 0.5, 1.7), result("c", 0.25, 1.0),
        result("d", 0.25, 1.0), result("d", 0.5, 1.0),
    ]  # fmt: skip
    found = Comparison({}, {"t": {"nll": 1.0}}, tuple(results), ())
    assert best_of(found, ["a", "b", "c"]) == "b"
    assert best_of(found, ["c"]) == ""


@pytest.mark.parametrize(
    ("repair", "wanted"),
    [("layer", [("ours", "layer"), ("ours, not repaired", "")]), ("", [("ours", "")])],
)
def test_what_planner_auto_takes_has_a_row_as_it_is_repaired(repair, wanted):
    found = labelled(("paper-act", "auto", "mine"), "", repair)
    assert found[0] == Method("the paper's rule", "paper-act")
    assert [(one.label, one.repair) for one in found[1:-1]] == wanted
    assert found[-1] == Method("mine", "mine")
