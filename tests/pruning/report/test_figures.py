"""Figures draw the numbers they are given, and say what their axes are."""

import dataclasses
import json

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pruning.report import audit_figures as token_plots
from pruning.report import figures as plots
from pruning.report.compared import Result
from pruning.report.comparison import Comparison
from pruning.report.comparison_page import (
    FAMILY_COLOURS,
    comparison_page,
    plot_pareto,
    plot_rates,
)
from pruning.report.comparison_sizes import plot_sizes, size_tables
from pruning.report.drawing import WIDTH

L, E = 3, 4
LAYERS = [1, 2, 4]


def by_label(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines()}


def violins(axes) -> list[np.ndarray]:
    """Corners of the violins of a panel, in the order they were drawn."""
    return [body.get_paths()[0].vertices for body in axes.collections]


def medians(axes) -> list[float]:
    return [line.get_ydata()[0] for line in axes.get_lines() if len(line.get_ydata()) == 1]


def test_loss_curves_have_one_line_per_expert_and_none_for_an_idle_one():
    rates = np.array([0, 0.5, 1])
    losses = np.random.default_rng(0).random((L, E, 3))
    losses[:, :, 0] = losses[0, 1] = 0
    axes = token_plots.plot_loss_curves(rates, losses, LAYERS).axes[0]
    drawn = np.array([line.get_ydata() for line in axes.get_lines()[: L * E]])
    expected = losses.reshape(-1, 3).copy()
    expected[1] = expected[:, 0] = np.nan  # zero has no logarithm
    np.testing.assert_array_equal(drawn, expected)
    assert axes.get_yscale() == "log" and "squared norm" in axes.get_ylabel()
    assert {"layer 1", "layer 2", "layer 4"} <= by_label(axes).keys()


def test_two_texts_share_the_violins_of_the_router_entropy():
    rng = np.random.default_rng(0)
    texts = {"one": rng.random((L, 50)), "two": 1 + rng.random((L, 70))}
    figure = token_plots.plot_router_entropy(texts, LAYERS, E)
    axes = figure.axes[0]
    bodies = violins(axes)
    assert len(bodies) == 2 * L
    for place in range(L):
        left, right = bodies[place], bodies[L + place]
        assert left[:, 0].max() == pytest.approx(place) == right[:, 0].min()
        assert left[:, 1].min() == pytest.approx(texts["one"][place].min())
        assert right[:, 1].max() == pytest.approx(texts["two"][place].max())
    np.testing.assert_allclose(
        medians(axes), np.concatenate([np.median(text, axis=1) for text in texts.values()])
    )
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4"]
    assert axes.get_ylabel().endswith("nats")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["one", "two", "no preference: ln 4 = 1.39"]


def test_a_deep_model_shows_twelve_routers_and_three_texts_are_refused():
    values = np.random.default_rng(0).random((48, 20))
    axes = token_plots.plot_router_entropy({"one": values}, range(48), E).axes[0]
    ticks = [int(tick.get_text()) for tick in axes.get_xticklabels()]
    assert len(violins(axes)) == len(ticks) == 12 and ticks[0] == 0 and ticks[-1] == 47
    np.testing.assert_allclose(medians(axes), np.median(values[ticks], axis=1))
    with pytest.raises(ValueError, match="3 texts do not fit"):
        token_plots.plot_router_entropy(dict.fromkeys("abc", values), range(48), E)


def test_expert_norms_are_drawn_for_the_chosen_experts_only():
    rng = np.random.default_rng(0)
    norms = {
        text: [[rng.lognormal(size=n) for n in (9, 8, 7, 6)] for _ in range(L)] for text in "ab"
    }
    norms["b"][2][3] = np.array([5.0])  # one token has no density
    norms["b"][2][0] = np.array([])
    figure = token_plots.plot_expert_norms(norms, LAYERS, {0: [2, 1], 2: [0, 3]})
    first, last = figure.axes
    assert first.get_title("left") == "Layer 1" and last.get_title("left") == "Layer 4"
    assert "norm" in first.get_ylabel() and "used expert" in last.get_xlabel()
    expected = [np.median(norms[text][0][expert]) for text in "ab" for expert in (2, 1)]
    np.testing.assert_allclose(medians(first), expected)
    assert len(violins(first)) == 4 and len(violins(last)) == 2
    assert medians(last)[-1] == 5.0 and len(medians(last)) == 3


def test_typical_experts_are_the_most_the_middling_and_the_least_used():
    tokens = np.array([[5, 9, 1, 7], [0, 1, 2, 3], [4, 3, 2, 1], [1, 1, 1, 1]])
    assert token_plots.typical_experts(tokens) == {0: [1, 0, 2], 2: [0, 2, 3], 3: [0, 2, 3]}
    assert token_plots.typical_experts(tokens[:1, :2]) == {0: [1, 0]}


def test_smoothings_are_drawn_with_mean_one_beside_what_was_measured():
    raw = np.array([1.0, 4.0, 7.0])
    figure = plots.plot_smoothing(raw, LAYERS, used="sqrt")
    lines = by_label(figure.axes[0])
    np.testing.assert_allclose(lines["measured"].get_ydata(), raw / 4)
    np.testing.assert_array_equal(lines["root"].get_xdata(), LAYERS)
    root = np.sqrt(raw)
    root = np.clip(root, root.mean() - root.std(ddof=1), root.mean() + root.std(ddof=1))
    np.testing.assert_allclose(lines["root"].get_ydata(), root / root.mean())
    assert lines["root"].get_linewidth() > lines["Huber tail"].get_linewidth()
    assert figure.axes[0].get_ylabel() == "layer loss (mean = 1)"


def test_routers_show_entropy_in_nats_and_a_mark_for_each_expert():
    usage = np.random.default_rng(0).dirichlet(np.ones(E), L)
    figure = plots.plot_routers(np.array([0.5, 1.0, 1.2]), usage, LAYERS)
    top, bottom = figure.axes
    np.testing.assert_array_equal(top.get_lines()[0].get_ydata(), [0.5, 1.0, 1.2])
    assert set(by_label(top)["no preference: ln 4 = 1.39"].get_ydata()) == {np.log(4)}
    np.testing.assert_array_equal([line.get_ydata() for line in bottom.get_lines()[:L]], usage)
    assert "nats" in top.get_ylabel() and "share" in bottom.get_ylabel()


def test_alignment_has_one_line_per_block_over_the_least_widths_it_has():
    grid = {(8, 16): 3.0, (8, 32): 2.0, (32, 32): 1.0}
    figure = plots.plot_alignment({"a, %": grid, "b, nats": grid, "c": grid})
    first, *_, unused = figure.axes
    lines = by_label(first)
    np.testing.assert_array_equal(lines["blocks of 8"].get_xydata(), [[0, 3], [1, 2]])
    np.testing.assert_array_equal(lines["blocks of 32"].get_xydata(), [[1, 1]])
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["16", "32"]
    assert first.get_ylabel() == "a, %" and not unused.axison


def comparison(**changes) -> Comparison:
    """Two families of two rules each, one of which cannot keep the smaller budget."""
    added = {
        ("paper-act", 0.25): 0.3, ("paper-act", 0.5): 0.6, ("paper-energy", 0.25): 0.2,
        ("paper-energy", 0.5): 0.9, ("experts-ala", 0.25): 0.5,
    }  # fmt: skip
    families = {"paper": "paper's rule", "experts": "whole experts"}
    results = tuple(
        Result(
            rule, rate, family=families[rule.partition("-")[0]], about=f"about {rule}",
            quality={"t": {"nll": 2 + nats, "tokens": 10, "kl": nats, "top1": 0.5}},
        )
        for (rule, rate), nats in added.items()
    )  # fmt: skip
    dense = {"t": {"nll": 2.0, "tokens": 10, "kl": None, "top1": None}}
    fields = {"key": {}, "dense": dense, "results": results, "refused": (),
              "sizes": {"dense": 100_000_000, "experts": 80_000_000}}  # fmt: skip
    return Comparison(**{**fields, **changes})


def test_the_pareto_figure_shows_the_best_rule_of_each_family_by_size():
    axes = plot_pareto(comparison()).axes[0]
    lines = by_label(axes)
    paper = lines["paper's rule: paper-act"]
    np.testing.assert_allclose(paper.get_xydata(), [[100, 0], [80, 0.3], [60, 0.6]])
    np.testing.assert_allclose(
        lines["whole experts: experts-ala"].get_xydata(), [[100, 0], [80, 0.5]]
    )
    assert to_hex(paper.get_color()) == FAMILY_COLOURS["paper's rule"]
    assert not any("paper-energy" in label for label in lines)
    assert axes.get_xlabel().endswith("MB") and axes.get_ylabel().startswith("nats")


def by_bytes() -> Comparison:
    """In 16 and 4 bits: (rule, rate, bits, target) -> megabytes and added nats."""
    measured = {
        ("unpruned", 0.0, 4, 0): (40, 0.1), ("a", 0.5, 16, 0): (60, 0.6),
        ("a", 0.5, 4, 0): (25, 0.7), ("b", 0.5, 4, 0): (25.02, 0.8),
        ("a", 0.2, 4, 30_000_000): (30, 0.3),
        ("a", 0.9, 16, 30_000_000): (30, 2.0),
    }  # fmt: skip
    results = tuple(
        Result(
            rule, rate, bits=bits, target=target, bytes=int(size * 1e6),
            quality={"t": {"nll": 2 + nats, "tokens": 10, "kl": nats, "top1": 0.5}},
        )
        for (rule, rate, bits, target), (size, nats) in measured.items()
    )  # fmt: skip
    return comparison(results=results, refused=(
        Result("b", 1.0, bits=16, target=30_000_000, reason="too small"),
    ))  # fmt: skip


def test_bits_and_channels_are_compared_by_bytes():
    found = by_bytes()
    equal, every = size_tables(found)
    assert equal.title == "At 30.0 MB, least loss first"
    assert [row[:6] + row[8:] for row in equal.rows] == [
        ["a 4-bit", "4", "20.0%", "30.0", "-", "0.3000", "front"],
        ["a", "16", "90.0%", "30.0", "-", "2.0000", ""],
    ]
    # Bytes alike to a thousandth are equal: what loses more is not ahead by its header.
    assert [(row[0], row[8]) for row in every.rows] == [
        ("a 4-bit", "front"), ("b 4-bit", ""), ("unpruned 4-bit", "front"), ("a", ""),
    ]  # fmt: skip
    (axes,) = plot_sizes(found).axes
    lines = by_label(axes)
    np.testing.assert_allclose(lines["4 bits"].get_xydata(), [[25, 0.7], [30, 0.3], [40, 0.1]])
    np.testing.assert_allclose(lines["16 bits"].get_xydata(), [[30, 2.0], [60, 0.6], [100, 0]])
    assert 30.0 in [line.get_xdata()[0] for line in axes.get_lines()]
    assert (found.rates, found.targets, found.bits) == ([0.5], [30_000_000], [4, 16])
    assert {line.rule for line in found.lines()} == {"a", "a 4-bit", "b 4-bit"}
    page = comparison_page(found)
    assert page.index("At 30.0 MB") < page.index("By bytes written") < page.index("too small")
    assert not size_tables(comparison())


def test_lines_of_fewer_bits_begin_at_what_rounding_alone_loses():
    (axes,) = plot_rates(by_bytes()).axes
    drawn = [line.get_xydata().round(9).tolist() for line in axes.get_lines()]
    assert [[0.0, 0.1], [0.5, 0.7]] in drawn and [[0.0, 0.0], [0.5, 0.6]] in drawn


def test_a_comparison_of_an_earlier_version_has_a_page_without_sizes(tmp_path):
    comparison(sizes={}).save(tmp_path)
    path = tmp_path / "compare.json"
    path.write_text(path.read_text().replace(',\n "sizes": {}', ""))
    assert "sizes" not in path.read_text()
    found = Comparison.load(path)
    assert comparison_page(comparison()).count("<img") == comparison_page(found).count("<img") + 1
    with pytest.raises(ValueError, match="compare again"):
        plot_pareto(found)


def test_a_rule_is_what_its_result_says_and_an_earlier_file_says_nothing(tmp_path):
    text = comparison_page(comparison())
    assert "about paper-act" in text
    assert comparison().csv().splitlines()[1].startswith("paper-act,paper's rule,0.25,")
    found = comparison()
    own = dataclasses.replace(found, results=tuple(
        dataclasses.replace(r, family="mine") if r.rule == "paper-act" else r for r in found.results
    ))  # fmt: skip
    mine = by_label(plot_pareto(own).axes[0])["mine: paper-act"]
    assert to_hex(mine.get_color()) not in FAMILY_COLOURS.values()
    found.save(tmp_path)
    path = tmp_path / "compare.json"
    stored = json.loads(path.read_text())
    for result in stored["results"]:
        del result["family"], result["about"]
    path.write_text(json.dumps(stored))
    earlier = Comparison.load(path)
    assert comparison_page(earlier).count("<img") == text.count("<img")
    assert "other: paper-act" in by_label(plot_pareto(earlier).axes[0])


def test_a_comparison_shows_its_table_in_a_notebook():
    shown = comparison()._repr_html_()
    assert shown.index("paper-energy") < shown.index("paper-act") and "+nats 0.25" in shown


def test_every_figure_fits_a_page():
    values = np.random.default_rng(0).random((L, E, 3))
    figures: list[Figure] = [
        token_plots.plot_loss_curves(np.linspace(0, 1, 3), values, LAYERS),
        token_plots.plot_router_entropy({"a": values[0]}, LAYERS, E),
        plots.plot_smoothing(values[:, 0, 0], LAYERS),
        plots.plot_routers(values[0, :3, 0], values[:, :, 0], LAYERS),
        plots.plot_alignment({"a": {(1, 1): 2.0}}),
        plot_pareto(comparison()),
        plot_sizes(by_bytes()),
    ]
    for figure in figures:
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= figure.get_figwidth() == WIDTH
        assert box.y0 >= 0 and box.y1 <= figure.get_figheight()
