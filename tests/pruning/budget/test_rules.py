import numpy as np
import pytest

from pruning.budget.clusters import (
    GrapeRules,
    default_fewest,
    layer_prior,
    merge_experts,
    representatives,
)
from pruning.budget.rule import Rule, common_budget, make_plan
from pruning.budget.rules import RULES, STANDARD, check_needs, select_rules, switches
from pruning.recipe.options import PlanOptions
from pruning.scores.expert_criteria import EXPERT_CRITERIA
from tests.support.synthetic import statistics

L, E, F, BLOCK = 3, 4, 8, 2


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_the_budget_exactly_and_leaves_enough_experts(name):
    stats = statistics(L, E, F, seed=3)
    stats = stats.replace(
        similarity=stats.similarity + np.swapaxes(stats.similarity, 1, 2),
        output_gram=np.einsum("lie,lje->lij", stats.output_gram, stats.output_gram),
    )
    budget = common_budget((L, E, F), 0.25, BLOCK)
    plan = make_plan(
        RULES[name], stats, budget=budget, block=BLOCK, experts_per_token=2,
        layer_indices=(1, 2, 4),
    )  # fmt: skip
    assert plan.keep.sum() == budget == 72
    assert (plan.counts % BLOCK == 0).all()
    assert ((plan.counts > 0).sum(axis=1) >= 2).all()
    if RULES[name].options.width == "experts":
        assert set(np.unique(plan.counts)) == {0, F}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_needs_no_statistics_but_those_it_names(name):
    everything = statistics(L, E, F)
    stats = everything.replace(
        similarity=everything.similarity + np.swapaxes(everything.similarity, 1, 2)
    )
    owners = {
        "gradients": ("taylor", "abs_taylor", "fisher", "gate_saliency", "gradient_square"),
        "expert-details": ("output_sum", "output_coordinate_square", "output_gram", "clipped_phi",
                           "similarity", "wanda_up", "wanda_gate", "input_square",
                           "routed_wanda_up", "routed_wanda_gate", "weighted_input_square"),
        "weight-gradients": ("weight_gradient",),
        "obs": ("elimination",),
    }  # fmt: skip
    assert set(owners) >= RULES[name].needs
    for group in set(owners) - RULES[name].needs:
        stats = stats.replace(**dict.fromkeys(owners[group]))
    arguments = {"block": BLOCK, "experts_per_token": 1, "layer_indices": range(L)}
    plan = make_plan(RULES[name], stats, budget=72, **arguments)
    assert plan.keep.sum() == 72


def test_a_rule_of_chance_is_drawn_several_times_and_each_differs():
    assert {name: rule.seeds for name, rule in RULES.items() if len(rule.seeds) > 1} == {
        "random": (0, 1, 2)
    }


def test_all_that_rules_need_is_switched_on_but_no_rule_turns_the_text_off(monkeypatch):
    assert switches(RULES) == ["expert_details", "gradients", "obs", "weight_gradients"]
    assert switches(["random", "uniform-wg"]) == ["weight_gradients"]
    for name, options in (("bare", {"criterion": "noise"}), ("ig", {"attribution": "nll_ig"})):
        rule = Rule(about=name, family="own", options=PlanOptions(**options))
        monkeypatch.setitem(RULES, name, rule)
        assert switches([name]) == [] and len(rule.needs) == 1
        with pytest.raises(ValueError, match=f"{name} need .*add --{next(iter(rule.needs))}"):
            check_needs([name], frozenset())


def test_names_and_patterns_select_rules_once():
    assert select_rules(["fair-*", "fair-act"], RULES) == [
        name for name in RULES if name.startswith("fair-")
    ]
    assert select_rules(["standard"], RULES) == list(STANDARD)
    assert select_rules(["all"], RULES) == list(RULES)
    check_needs(STANDARD, frozenset())


def test_an_unknown_rule_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'uniform-energy'"):
        select_rules(["uniform-enrgy"], RULES)


@pytest.mark.parametrize(
    ("name", "flag"),
    [("uniform-fisher", "--gradients"), ("naee", "--expert-details"),
     ("uniform-wg", "--weight-gradients")],
)  # fmt: skip
def test_a_rule_without_its_statistics_is_refused_with_the_flag(name, flag):
    with pytest.raises(ValueError, match=f"{name} need .*add {flag}"):
        check_needs(["random", name], frozenset())


def test_a_rate_that_not_all_rules_can_keep_exactly_is_refused_with_those_they_can():
    assert common_budget((L, E, F), 0.3, BLOCK) == 72
    with pytest.raises(ValueError, match=r"prune_rate=0.1 .*possible are 0.75, 0.5, 0.25"):
        common_budget((L, E, F), 0.1, BLOCK)


def test_what_is_fixed_beforehand_is_as_many_experts_as_the_budget_pays_for():
    stats = statistics(L, E, F, seed=3)
    stats = stats.replace(similarity=stats.similarity + np.swapaxes(stats.similarity, 1, 2))
    prepare = {name: RULES[name].prepare for name in ("naee", "grape", "grape-prior")}
    # Earlier layers have what is left over.
    assert list(prepare["naee"](stats, 7, 1).experts.sum(axis=1)) == [3, 2, 2]
    assert list(prepare["naee"](stats, 8, 1).experts.sum(axis=1)) == [3, 3, 2]
    for kept in (7, 8):
        clusters = merge_experts(stats.similarity, kept, GrapeRules(fewest=default_fewest(E, 1)))
        one = prepare["grape"](stats, kept, 1).experts
        best = EXPERT_CRITERIA["ala"](stats)
        np.testing.assert_array_equal(one, representatives(clusters, best))
        assert one.sum() == kept
        shares = prepare["grape-prior"](stats, kept, 1).layer_shares
        np.testing.assert_array_equal(shares, layer_prior(clusters))


def test_dek_leaves_as_many_clusters_in_every_layer_each_by_its_best_expert():
    stats = statistics(L, 6, F, seed=8)
    similarity = stats.similarity + np.swapaxes(stats.similarity, 1, 2)
    stats = stats.replace(similarity=similarity)
    for kept, quotas in ((8, [3, 3, 2]), (13, [5, 4, 4])):
        found = RULES["dek"].prepare(stats, kept, 1).experts
        for layer, quota in enumerate(quotas):
            clusters = {e: [e] for e in range(6)}  # by their lowest expert
            while len(clusters) > quota:
                pairs = [(i, j) for i in clusters for j in clusters if i < j]
                i, j = max(pairs, key=lambda pair: similarity[layer][pair])
                clusters[i] += clusters.pop(j)
            worth = stats.phi[layer]
            best = {max(members, key=lambda e: worth[e]) for members in clusters.values()}
            assert set(np.flatnonzero(found[layer])) == best
