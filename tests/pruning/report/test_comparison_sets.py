"""Losses by calibration set and text, by hand."""

import numpy as np

from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.comparison_sets import plot_sets, sensitivities, set_tables

# rule -> set -> (added nats on web, on code) of each seed
ADDED = {
    "a": {"": [(0.5, 0.5)], "web": [(0.25, 1.0)], "code": [(0.75, 0.5)]},
    "random": {"": [(1.0, 1.0), (2.0, 1.0)], "web": [(1.0, 2.0), (2.0, 3.0)],
               "code": [(1.0, 1.0), (1.0, 2.0)]},
    "late": {"": [(0.1, 0.1)], "web": [(0.1, 0.1)]},  # not measured with all sets
}  # fmt: skip


def comparison(added=ADDED) -> Comparison:
    dense = {text: {"nll": 0.0, "tokens": 9, "kl": None, "top1": None} for text in ("web", "code")}
    results = tuple(
        Result(rule, 0.5, seed, kept=4, calibration=name, overlap=0.25 if name else 1.0,
               quality={text: {"nll": nats, "tokens": 9, "kl": nats, "top1": 0.5}
                        for text, nats in zip(dense, values, strict=True)})
        for rule, sets in added.items()
        for name, seeds in sets.items()
        for seed, values in enumerate(seeds)
    )  # fmt: skip
    drawn = Result("a", 0.5, draw=1, kept=4, quality=results[0].quality)
    whole = Result("unpruned", 0.0, top_k=1, kept=8, quality=results[0].quality)
    return Comparison({}, dense, (*results, drawn, whole), ())


def test_seeds_are_averaged_and_rules_with_all_sets_are_shown():
    one, other = sensitivities(comparison())
    assert (one.rule, other.rule, one.place) == ("a", "random", "0.5")
    assert one.sets == ("web", "code", "(calibration)") and one.texts == ("web", "code")
    np.testing.assert_array_equal(one.added, [[0.25, 1.0], [0.75, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(other.added, [[1.5, 2.5], [1.0, 1.5], [1.5, 1.0]])
    np.testing.assert_array_equal(one.alike, [0.25, 0.25, 1.0])
    assert {line.rule: line.added for line in comparison().lines()} == {
        "a": 0.5, "random": 1.25, "late": 0.1
    }  # fmt: skip


def test_one_table_has_every_set_on_every_text():
    (table,) = set_tables(comparison())
    assert table.header == ["rule", "at", "scored on", "web", "code", "mean", "worst", "kept alike"]
    assert table.rows[:3] == [
        ["a", "0.5", "web", "0.2500", "1.0000", "0.6250", "1.0000", "25.0%"],
        ["", "", "code", "0.7500", "0.5000", "0.6250", "0.7500", "25.0%"],
        ["", "", "(calibration)", "0.5000", "0.5000", "0.5000", "0.5000", "100.0%"],
    ]
    plain = {rule: {"": sets[""]} for rule, sets in ADDED.items()}
    assert set_tables(comparison(plain)) == []


def test_the_figure_frames_what_is_measured_on_itself():
    first, second = plot_sets(comparison()).axes
    assert first.get_title(loc="left") == "a at 0.5"
    words = {text.get_text(): text.get_position() for text in first.texts}
    assert words["1.000"] == (1, 0) and words["0.750"] == (0, 1)
    frames = [line.get_xydata().mean(axis=0).round() for line in first.get_lines()]
    assert [frame.tolist() for frame in frames] == [[0.0, 0.0], [1.0, 1.0]]
    shades = np.asarray(first.images[0].get_array())
    np.testing.assert_allclose(shades, [[0, 1], [1, 0], [0.5, 0]])  # behind the best of a column
    assert second.get_title(loc="left") == "random at 0.5"
