"""Budgets that a recipe allows, targets, and what a plan notes: statistics and sizes made up."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from convert.export import Export
from pruning.recipe.recipe import ResolvedRecipe
from pruning.stages import plan as planning
from pruning.stages.sizes import expert_widths, form_of
from tests.pruning.stages.test_sizes import WEIGHTS, F, base, described, recipe  # noqa: F401
from tests.support.synthetic import statistics

L, E = 2, 2
SOURCES = [{"path": "/a/b.txt", "sha256": "x", "weight": 2.0, "documents": 3, "tokens": 9,
            "loss_on": "answers", "more": 1}, {"path": "c.txt", "sha256": "y", "weight": 1.0,
                                               "documents": 1, "tokens": 2}]  # fmt: skip
KNOWN = {"model_hash": "abc", "sources": SOURCES}


@pytest.fixture
def asked(monkeypatch):
    """What the search for a plan of a target was asked."""
    given: dict[str, Any] = {}

    def search(made, cost, target, **options):
        given.update(options, target=target, cost=cost)
        return made(options["fewest"])

    monkeypatch.setattr(planning, "plan_for_target", search)
    return given


def planned(base, options: ResolvedRecipe):  # noqa: F811
    return planning.plan(options, statistics(L, E, F), KNOWN, base)


@pytest.mark.parametrize(
    ("changes", "fewest", "most", "step"),
    [
        # One expert a token, in each of two layers of two experts with 96 channels.
        ({}, 2 * 8, 384, 8),
        ({"minimum": 20}, 2 * 24, 384, 8),
        ({"keep_experts": True}, 4 * 8, 384, 8),
        ({"width": "uniform"}, 4 * 8, 384, 4 * 8),
        ({"width": "layer"}, 4 * 8, 384, 2 * 8),
        ({"width": "experts"}, 2 * 96, 384, 96),
        ({"width": "capped", "cap": 44}, 2 * 8, 2 * 2 * 40, 8),
        ({"width": "combined", "expert_rate": 0.25}, 2 * 8, 3 * 96, 8),
        ({"layer_rate": ("2=0.75",)}, 48 + 8, 48 + 192, 8),
        ({"layer_rate": ("0=0.5", "2=0.75")}, 96 + 48, 96 + 48, 8),
    ],
)
def test_a_target_is_searched_among_the_budgets_that_the_options_allow(
    base, asked, changes, fewest, most, step  # noqa: F811
):  # fmt: skip
    options = recipe(base, "ragged-bf16", block=8, target_bytes=10**6, planner="fair", **changes)
    plan = planned(base, options)
    assert (asked["fewest"], asked["channels"], asked["step"]) == (fewest, most, step)
    assert (asked["target"], asked["unit"]) == (10**6, "bytes")
    assert plan.keep.sum() <= fewest and plan.provenance["budget"] == fewest


def test_costs_are_bytes_of_the_first_export_or_parameters_of_the_model(base, asked):  # noqa: F811
    counts = np.array([[96, 40], [8, 0]])
    options = recipe(base, "ragged-bf16", "padded-bf16", block=8, target_bytes=10**6,
                     planner="fair")  # fmt: skip
    planned(base, options)
    widths = expert_widths(counts, base.config.moe_layers, base)
    wanted = Export(base, widths, form_of(options, "ragged-bf16")).nbytes
    assert asked["cost"](counts) == wanted
    planned(base, recipe(base, "ragged-bf16", block=8, target_parameters=10**5, planner="fair"))
    assert (asked["unit"], asked["target"]) == ("parameters", 10**5)
    assert asked["cost"](np.full((2, 2), F)) == WEIGHTS
    assert asked["cost"](counts) == WEIGHTS - 3 * 64 * (384 - 144)


def test_a_plan_notes_its_texts_without_their_folders_and_what_was_scored(base):  # noqa: F811
    options = recipe(base, "ragged-bf16", prune_rate=0.5, block=8, planner="fair", gradients=True,
                     evaluation=("/x/e.txt", "f.txt=2"), window=32)  # fmt: skip
    plan = planned(base, options)
    found = plan.provenance
    first, second = found["sources"]
    assert first == {"text": "b.txt", "sha256": "x", "weight": 2.0, "documents": 3, "tokens": 9,
                     "loss_on": "answers"}  # fmt: skip
    assert second == {"text": "c.txt", "sha256": "y", "weight": 1.0, "documents": 1, "tokens": 2}
    assert (found["model_hash"], found["tokens"]) == ("abc", 100)
    assert found["evaluation"] == ["e.txt", "f.txt=2"]
    assert found["repair"] == options.repair
    assert found["scoring"]["gradients"] is True and found["scoring"]["window"] == 32
    assert set(found["scoring"]) == set(planning.SCORING) <= set(dataclasses.asdict(options))
    assert plan.layer_indices == (0, 2) and found["experts_per_token"] == 1
    assert plan.keep.sum() == 192 and found["prune_rate"] == 0.5
    bare = planning.plan(options, statistics(L, E, F), {"model_hash": "abc"}, base)
    assert bare.provenance["sources"] == []


def test_plans_of_several_rates_lie_in_each_other(base):  # noqa: F811
    options = recipe(base, "ragged-bf16", prune_rate=0.1, block=8, planner="fair")
    found = planning.plans_of_rates(options, [0.75, 0.25], statistics(L, E, F), KNOWN, base)
    assert [plan.provenance["prune_rate"] for plan in found] == [0.75, 0.25]
    assert [plan.provenance["nested_in"] for plan in found] == [0.25, None]
    assert not (found[0].keep & ~found[1].keep).any()
    assert found[0].provenance["model_hash"] == "abc" and found[0].layer_indices == (0, 2)
    assert found[0].provenance["experts_per_token"] == 1
