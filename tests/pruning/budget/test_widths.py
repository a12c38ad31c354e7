import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.errors import InputError
from pruning.budget.planners import PLANNERS
from pruning.budget.problem import Problem
from pruning.budget.widths import ALIGNMENTS, WIDTHS
from pruning.kit.errors import BudgetError
from pruning.scores.criteria import ChannelScores, channel_scores
from tests.support.plans import plan_of
from tests.support.synthetic import statistics

L, E, F = 3, 4, 12
OBJECTIVES = [name for name, planner in PLANNERS.items() if planner.objective]


def plan(stats=None, **changes):
    options = {"prune_rate": 0.5, "experts_per_token": 2} | changes
    return plan_of(statistics(L, E, F) if stats is None else stats, **options)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 9),
    prune_rate=st.floats(0.0, 0.7),
    planner=st.sampled_from(sorted(OBJECTIVES)),
    width=st.sampled_from(["free", "capped", "combined"]),
    align=st.sampled_from(sorted(ALIGNMENTS)),
    per_layer=st.booleans(),
    block=st.sampled_from([1, 2, 3, 4]),
    minimum=st.integers(1, 8),
)
def test_every_policy_and_alignment_gives_legal_widths_within_the_budget(
    seed, prune_rate, planner, width, align, per_layer, block, minimum
):
    budget = round((1.0 - prune_rate) * L * E * F)
    least = -(-minimum // block) * block
    options = {"planner": planner, "width": width, "align": align, "per_layer": per_layer}
    options |= {"block": block, "minimum": minimum, "cap": 9, "expert_rate": 0.25}
    needed = L * 2 * least
    room = {"free": L * E * F, "capped": L * E * (9 // block * block), "combined": 9 * F}[width]
    if budget < needed or budget > room or (width == "capped" and least > 9):
        with pytest.raises(ValueError, match=r"budget|cap=9"):
            plan(statistics(L, E, F, seed=seed), prune_rate=prune_rate, **options)
        return
    result = plan(statistics(L, E, F, seed=seed), prune_rate=prune_rate, **options)
    counts, record = result.counts, result.provenance
    assert ((counts == 0) | ((counts >= least) & (counts % block == 0))).all()
    assert ((counts > 0).sum(axis=1) >= 2).all()
    assert counts.max() <= (9 if width == "capped" else F)
    if width == "combined":
        assert (counts == 0).sum() >= 3
    left = budget - counts.sum()
    assert left >= 0
    if (least == block or align.startswith("paper")) and width == "free" and not per_layer:
        assert left < block or (np.isin(counts, [0, F]).all() and left < least)
    assert record["coverage_aligned"] <= record["coverage_optimum"] + 1e-9
    assert record["unspent"] == left


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 9),
    prune_rate=st.floats(0.0, 0.9),
    planner=st.sampled_from(sorted(PLANNERS)),
    width=st.sampled_from(["free", "capped", "layer", "uniform"]),
    align=st.sampled_from(sorted(ALIGNMENTS)),
    per_layer=st.booleans(),
    block=st.sampled_from([1, 2, 3, 4]),
    minimum=st.integers(1, 8),
    own_rate=st.booleans(),
)
def test_experts_that_are_kept_have_the_least_width_under_every_planner_and_policy(
    seed, prune_rate, planner, width, align, per_layer, block, minimum, own_rate
):
    if PLANNERS[planner].objective is None:
        align = "paper"
    budget, least = round((1.0 - prune_rate) * L * E * F), -(-minimum // block) * block
    options = {"planner": planner, "width": width, "align": align, "per_layer": per_layer}
    options |= {"block": block, "minimum": minimum, "cap": 9 if width == "capped" else None}
    options |= {"layer_rate": (f"1={prune_rate}",) if own_rate else (), "keep_experts": True}
    try:
        result = plan(statistics(L, E, F, seed=seed), prune_rate=prune_rate, **options)
    except InputError:
        # Layers round their shares; a cap may leave less room than the budget.
        assert budget < L * (E * least + own_rate * E) or width != "free"
        return
    assert result.counts.min() >= least and result.counts.sum() <= budget + L * own_rate


def test_the_rule_of_whole_layers_still_tells_them_apart_where_no_expert_may_go():
    stats = statistics(L, E, F, seed=3)
    counts = plan(stats, planner="cd_moe", block=2, minimum=2, keep_experts=True).counts
    # The layers of least loss stay condensed, the others whole.
    whole = (counts == F).sum(axis=1)
    losses = channel_scores(stats, criterion="shapley", attribution="ala").layer
    assert counts.min() == 2 and whole.sum() > 0
    assert (np.diff(whole[np.argsort(losses)]) >= 0).all()


@pytest.mark.parametrize("width", ["experts", "combined"])
def test_whole_experts_cannot_go_and_be_kept(width):
    with pytest.raises(InputError, match=f"width='{width}' removes whole experts, keep_experts"):
        plan(width=width, keep_experts=True)


def test_too_small_a_budget_for_all_experts_is_refused_with_the_cure():
    with pytest.raises(InputError, match=r"4 experts of 8 channels.*lower the prune rate, the min"):
        plan(minimum=8, keep_experts=True)


def test_the_optimum_covers_more_than_the_rule_and_the_plan_says_by_how_much():
    stats = statistics(L, E, 48, seed=3)
    options = {"block": 4, "minimum": 16, "planner": "paper"}
    rule, best, hull = (
        plan(stats, align=align, **options).provenance for align in ("paper", "dp", "hull")
    )
    assert rule["coverage_aligned"] < best["coverage_aligned"] == best["coverage_optimum"]
    assert rule["coverage_optimum"] == best["coverage_optimum"]
    assert rule["coverage_before"] == best["coverage_before"]
    assert hull["coverage_aligned"] <= best["coverage_aligned"]


def test_recorded_coverage_is_the_weighted_mean_of_the_experts_coverage():
    stats = statistics(L, E, F)
    result = plan(stats, planner="linear", block=4, weights="attribution")
    scores = channel_scores(stats)
    weights = scores.expert
    expected = (weights * result.expert_coverage(scores.channel)).sum() / weights.sum()
    assert result.provenance["coverage_aligned"] == pytest.approx(expected, rel=1e-3)


def test_an_optimum_needs_a_planner_with_an_objective():
    for planner in sorted(set(PLANNERS) - set(OBJECTIVES)):
        with pytest.raises(ValueError, match=f"planner='{planner}' has none"):
            plan(planner=planner, align="dp", block=4)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("block", [1, 4])
def test_one_width_per_layer(planner, block):
    for rate in (0.0, 0.3, 0.6):
        result = plan(prune_rate=rate, planner=planner, width="layer", block=block)
        counts = result.counts
        assert (counts == counts[:, :1]).all()
        assert (counts % block == 0).all() and (counts >= block).all()
        # What is left does not pay for another block of all experts of a layer.
        assert 0 <= result.provenance["unspent"] < E * block


def test_the_end_to_end_loss_of_layers_reaches_layers_of_one_width_and_of_fixed_rates():
    stats = statistics(L, E, F, nll_ig=np.full((L, E), [[1.0], [9.0], [4.0]]))
    options = {"criterion": "energy", "planner": "paper", "layer_loss": "nll_ig", "passes": 0}
    counts = plan(stats, width="layer", **options).counts[:, 0]
    assert counts.argmax() == 1 and counts.argmin() == 0
    fixed = plan(stats, layer_rates={0: 0.5}, **options).counts.sum(axis=1)
    assert fixed[0] == E * F / 2 and fixed[1] > fixed[2]


def test_one_width_per_layer_serves_the_better_layer_first():
    stats = statistics(L, E, F)
    stats.hidden_square[1] *= 100.0
    stats.up_square[1] *= 100.0
    stats.gate_square[1] *= 100.0
    result = plan(stats, criterion="act", planner="global_topk", width="layer", prune_rate=0.5)
    counts = result.counts[:, 0]
    assert counts[1] > max(counts[0], counts[2])


@pytest.mark.parametrize("per_layer", [False, True])
def test_whole_experts_are_the_best_and_match_the_budget(per_layer):
    stats = statistics(L, E, F)
    result = plan(stats, width="experts", prune_rate=0.25, per_layer=per_layer)
    kept = result.counts == F
    assert ((result.counts == 0) | kept).all() and kept.sum() == 9
    if per_layer:
        assert kept.sum(axis=1).tolist() == [3, 3, 3]
        for layer in range(L):
            worst = stats.phi[layer].argmin()
            assert not kept[layer, worst]


def test_a_choice_of_experts_is_followed_or_refused():
    choice = np.array([[True, True, False, True]] * L)
    result = plan(width="experts", prune_rate=0.25, experts=choice)
    np.testing.assert_array_equal(result.counts, np.where(choice, F, 0))
    mixed = plan(width="combined", prune_rate=0.5, experts=choice)
    assert mixed.counts.sum() == L * E * F // 2 and not mixed.counts[:, 2].any()
    with pytest.raises(ValueError, match=r"pays for 6 whole experts, but 9 were.*is 0\.25"):
        plan(width="experts", prune_rate=0.5, experts=choice)
    with pytest.raises(ValueError, match="keeps 1 in one layer, every token needs 2"):
        plan(width="experts", experts=np.eye(3, 4, dtype=bool))
    with pytest.raises(ValueError, match="experts is int64"):
        plan(width="experts", experts=np.ones((L, E), np.int64))


def test_too_narrow_a_cap_names_the_nearest_rate():
    with pytest.raises(ValueError, match=r"exceeds the 48 .*feasible prune rate is 0\.6666"):
        plan(width="capped", cap=4, prune_rate=0.5)
    with pytest.raises(ValueError, match=r"cap=13 must lie in \[1, 12\]"):
        plan(width="capped", cap=13)
    with pytest.raises(ValueError, match=r"width='capped' needs a cap"):
        plan(width="capped")
    with pytest.raises(ValueError, match=r"expert_rate=1\.0 must lie"):
        plan(width="combined", expert_rate=1.0)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("width", [name for name in WIDTHS if name != "uniform"])
def test_layers_of_a_fixed_rate_keep_it_and_the_others_make_up_the_rest(planner, width):
    rates = {5: 0.0, 9: 0.5}
    result = plan(
        planner=planner,
        width=width,
        layer_rates=rates,
        layer_indices=[5, 7, 9],
        prune_rate=1 / 3,
        cap=F,
    )
    assert result.counts.sum(axis=1).tolist() == [48, 24, 24]
    assert result.provenance["layer_rates"] == {"5": 0.0, "9": 0.5}


def test_impossible_layer_rates_are_refused():
    with pytest.raises(ValueError, match=r"layer_rates names layers \[3\], those with experts"):
        plan(layer_rates={3: 0.5})
    with pytest.raises(ValueError, match=r"layer_rate='0=1\.5' must be .* a rate in \[0, 1\)"):
        plan(layer_rates={0: 1.5})
    with pytest.raises(ValueError, match=r"leave 72 channels .* others, which keep 2 to 48"):
        plan(layer_rates={0: 0.5, 1: 0.0}, prune_rate=0.0)
    with pytest.raises(ValueError, match=r"keep 96 channels, .* is 144; give the prune rate 0\.33"):
        plan(layer_rates={0: 0.5, 1: 0.0, 2: 0.5}, prune_rate=0.0)
    even = plan(layer_rates={0: 0.5, 1: 0.0, 2: 0.5}, prune_rate=1 / 3)
    assert even.counts.sum(axis=1).tolist() == [24, 48, 24]
    with pytest.raises(ValueError, match="either layer_rates or layer_shares"):
        plan(layer_rates={0: 0.5}, layer_shares=np.ones(L))


@pytest.mark.parametrize("block", [1, 3])
def test_layer_shares_are_the_layers_budgets(block):
    shares = np.array([1.0, 2.0, 3.0])
    result = plan(layer_shares=shares, block=block, prune_rate=0.5)
    assert result.counts.sum(axis=1).tolist() == [12, 24, 36]
    assert result.provenance["unspent"] == 0


def test_budgets_can_be_given_in_channels():
    assert plan(prune_rate=None, channels=50).counts.sum() == 50
    assert plan(prune_rate=None, channels=50).provenance["prune_rate"] == 1 - 50 / (L * E * F)
    with pytest.raises(ValueError, match=r"give either prune_rate=0\.5 or channels=50"):
        plan(channels=50)
    with pytest.raises(ValueError, match=r"channels=0 must lie in \[1, 144\]"):
        plan(prune_rate=None, channels=0)


def test_a_plan_within_another_keeps_no_channel_that_the_other_lacks():
    larger = plan(prune_rate=0.3, block=4)
    smaller = plan(prune_rate=0.6, block=4, within=larger.counts)
    assert not (smaller.keep & ~larger.keep).any()
    assert smaller.counts.sum() == math.floor(0.4 * L * E * F) // 4 * 4
    with pytest.raises(ValueError, match=r"within is \[2, 4\]"):
        plan(within=np.ones((2, 4), int))


@pytest.mark.parametrize("per_layer", [False, True])
def test_experts_that_may_not_stay_whole_are_passed_over_whatever_they_are_worth(per_layer):
    """Limits as a larger plan sets them: of the experts that stay, the worthiest."""
    rng = np.random.default_rng(0)
    layers, experts, width = 2, 6, 4
    scores = ChannelScores(
        channel=rng.random((layers, experts, width)),
        expert=np.array([[9.0, 1.0, 8.0, 2.0, 7.0, 3.0], [1.0, 5.0, 6.0, 4.0, 9.0, 2.0]]),
        layer=np.ones(layers), layer_nll=np.ones(layers),
    )  # fmt: skip
    most = np.full((layers, experts), width)
    most[0, 0] = most[1, 4] = 0
    most[0, 2] = width - 1
    problem = Problem(
        scores=scores, budget=4 * width, floor=np.zeros((layers, experts), np.int64), most=most,
        planner=PLANNERS["fair"], per_layer=per_layer, expert_rate=0.5,
    )  # fmt: skip

    def best(allowed, kept):
        places = [p for p in np.ndindex(layers, experts) if allowed[p]]
        places.sort(key=lambda p: -scores.expert[p])
        if per_layer:
            return {
                p for at in range(layers) for p in [q for q in places if q[0] == at][: kept // 2]
            }
        return set(places[:kept])

    whole = WIDTHS["experts"](problem).counts
    assert set(np.unique(whole)) == {0, width}
    assert set(zip(*np.nonzero(whole), strict=True)) == best(most == width, 4)
    # No more can stay than may.
    most_of_all = dataclasses.replace(problem, budget=12 * width, per_layer=False)
    assert (WIDTHS["experts"](most_of_all).counts == np.where(most == width, width, 0)).all()
    some = WIDTHS["combined"](problem).counts
    assert some.sum() == problem.budget and (some <= most).all()
    assert set(zip(*np.nonzero(some), strict=True)) <= best(most > 0, 6)


def test_one_width_per_layer_needs_the_minimum_for_every_layer():
    scores = ChannelScores(
        channel=np.random.default_rng(0).random((3, 4, 6)), expert=np.ones((3, 4)),
        layer=np.ones(3), layer_nll=np.ones(3),
    )  # fmt: skip
    problem = Problem(
        scores=scores, budget=3 * 4 * 5, floor=np.full((3, 4), 5), most=np.full((3, 4), 6),
        planner=PLANNERS["fair"], least=5,
    )  # fmt: skip
    assert (WIDTHS["layer"](problem).counts == 5).all()
    for budget in (3 * 4 * 5 - 1, 4 * 5, 4):
        with pytest.raises(BudgetError, match=rf"{budget} channels leaves less than 5 for each"):
            WIDTHS["layer"](dataclasses.replace(problem, budget=budget))
