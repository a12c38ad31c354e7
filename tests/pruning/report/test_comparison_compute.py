"""Rows by what a token reads, by hand."""

from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.comparison_compute import compute_tables, plot_compute

# rule, rate, bits, top_k, skip_below, nats added, what a token reads of 8 MB in all.
ROWS = [
    ("unpruned", 0.0, 16, 0, 0.0, 0.0, 6_000_000),
    ("unpruned", 0.0, 16, 2, 0.0, 0.1, 4_000_000),
    ("unpruned", 0.0, 16, 1, 0.0, 0.5, 3_000_000),
    ("unpruned", 0.0, 16, 4, 0.25, 0.3, 5_000_000),
    ("smart", 0.5, 16, 0, 0.0, 0.6, 4_000_000),
    ("smart", 0.5, 4, 0, 0.0, 0.7, 1_500_000),
    ("older", 0.5, 16, 0, 0.0, 0.2, 0),  # of an earlier version
]


def comparison(rows) -> Comparison:
    results = tuple(
        Result(rule, rate, bits=bits, top_k=k, skip_below=share, kept=int(8 * (1 - rate)),
               parameters=4_000_000, bytes=8_000_000, active=read // 2, active_bytes=read,
               quality={"t": {"nll": nats, "tokens": 9, "kl": nats / 2, "top1": 0.5}})
        for rule, rate, bits, k, share, nats, read in rows
    )  # fmt: skip
    dense = {"t": {"nll": 0.0, "tokens": 9, "kl": None, "top1": None}}
    return Comparison({}, dense, results, (), {"dense": 8_000_000, "experts": 4_000_000})


def test_all_that_is_known_is_ordered_by_what_a_token_reads():
    (table,) = compute_tables(comparison(ROWS))
    assert table.header == [
        "rule", "bits", "pruned", "M", "MB", "M met", "MB met", "+nats", "KL", "top-1", ""
    ]  # fmt: skip
    assert [(row[0], row[6], row[7], row[10]) for row in table.rows] == [
        ("smart 4-bit", "1.5", "0.7000", "front"), ("top-1", "3.0", "0.5000", "front"),
        ("top-2", "4.0", "0.1000", "front"), ("smart", "4.0", "0.6000", ""),
        ("skip-0.25", "5.0", "0.3000", ""), ("unpruned", "6.0", "0.0000", "front"),
    ]  # fmt: skip
    assert table.rows[3][:6] == ["smart", "16", "50.0%", "4.00", "8.0", "2.00"]


def test_what_tokens_go_to_is_no_rule_and_no_size():
    found = comparison(ROWS)
    assert {line.rule for line in found.lines()} == {"smart", "smart 4-bit", "older"}
    assert [line.rule for line in found.fewer()] == ["top-2", "skip-0.25", "top-1"]
    assert not {"top-2", "skip-0.25", "top-1"} & {line.rule for line in found.points()}
    assert compute_tables(comparison([row for row in ROWS if not row[3]])) == []


def test_lines_of_fewer_experts_end_at_the_whole_model():
    (axes,) = plot_compute(comparison(ROWS)).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert lines["top, 16 bits"] == [[3.0, 0.5], [4.0, 0.1], [6.0, 0.0]]
    assert lines["skip, 16 bits"] == [[5.0, 0.3], [6.0, 0.0]]
    rings = {one.get_label(): sorted(one.get_offsets().tolist()) for one in axes.collections}
    assert rings["rules, 16 bits"] == [[4.0, 0.6], [6.0, 0.0]]
    assert rings["rules, 4 bits"] == [[1.5, 0.7]]
