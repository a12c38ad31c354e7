import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pruning.budget.plan import PruningPlan
from pruning.budget.planners import PLANNERS
from pruning.scores.criteria import channel_scores
from tests.support.plans import plan_of
from tests.support.synthetic import statistics

L, E, F = 2, 4, 12


def plan(stats=None, **changes):
    options = {"prune_rate": 0.5, "experts_per_token": 2} | changes
    return plan_of(statistics(L, E, F) if stats is None else stats, **options)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 9),
    prune_rate=st.floats(0.0, 0.999),
    planner=st.sampled_from(sorted(PLANNERS)),
    criterion=st.sampled_from(["act", "shapley", "fisher", "random"]),
    block=st.sampled_from([1, 2, 3, 4, 6, 12]),
    minimum=st.integers(1, F),
    experts_per_token=st.integers(1, E),
)
def test_a_plan_meets_its_budget_blocks_and_floors_or_says_why_not(
    seed, prune_rate, planner, criterion, block, minimum, experts_per_token
):
    budget = round((1.0 - prune_rate) * L * E * F)
    least = -(-minimum // block) * block
    options = {"planner": planner, "criterion": criterion, "block": block, "minimum": minimum}
    options |= {"prune_rate": prune_rate, "experts_per_token": experts_per_token}
    needed = L * experts_per_token * least
    # An even split over layers needs room for the floors in the poorer layer.
    if budget < needed or (planner == "layer_topk" and budget // L * L < needed):
        with pytest.raises(ValueError, match="budget"):
            plan(statistics(L, E, F, seed=seed), **options)
        return
    counts = plan(statistics(L, E, F, seed=seed), **options).counts
    assert ((counts == 0) | ((counts >= least) & (counts % block == 0))).all()
    assert ((counts > 0).sum(axis=1) >= experts_per_token).all()
    left = budget - counts.sum()
    # What is left is less than a block, or too little to bring back another expert.
    assert 0 <= left < block or (np.isin(counts, [0, F]).all() and left < least)


@pytest.mark.parametrize("width", ["free", "layer", "uniform"])
@pytest.mark.parametrize("planner", ["fair", "paper", "global_topk", "random"])
def test_on_a_grid_the_groups_of_largest_sum_stay_whole(planner, width):
    stats = statistics(L, E, F)
    found = plan(stats, planner=planner, width=width, grid=3, block=6)
    scores = channel_scores(stats).channel
    for keep, score in zip(found.keep.reshape(-1, F), scores.reshape(-1, F), strict=True):
        groups = keep.reshape(-1, 3)
        assert (groups.all(axis=1) == groups.any(axis=1)).all()
        best = np.argsort(-score.reshape(-1, 3).sum(axis=1), kind="stable")[: keep.sum() // 3]
        assert set(best) == set(np.flatnonzero(groups.all(axis=1)))
    assert 0 < found.keep.mean() < 1 and found.provenance["grid"] == 3
    with pytest.raises(ValueError, match="block=4 must be a multiple of grid=3"):
        plan(stats, grid=3, block=4)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("width", ["free", "uniform"])
@pytest.mark.parametrize("block", [1, 4])
def test_prune_rate_zero_keeps_everything(planner, width, block):
    assert plan(prune_rate=0.0, planner=planner, width=width, block=block).keep.all()


@pytest.mark.parametrize("planner", PLANNERS)
def test_the_highest_feasible_prune_rate_leaves_only_the_floor(planner):
    counts = plan(prune_rate=1.0 - 4 / (L * E * F), planner=planner).counts
    assert (np.sort(counts, axis=1) == [[0, 0, 1, 1]] * L).all()
    expert = statistics(L, E, F).phi
    assert (np.argsort(expert, axis=1)[:, -2:] == np.argsort(counts * expert, axis=1)[:, -2:]).all()


@pytest.mark.parametrize("criterion", ["act", "energy", "fisher"])
def test_every_expert_keeps_its_best_channels(criterion):
    stats = statistics(L, E, F)
    result = plan(stats, criterion=criterion)
    scores = channel_scores(stats, criterion=criterion).channel
    for place in np.ndindex(L, E):
        kept, dropped = scores[place][result.keep[place]], scores[place][~result.keep[place]]
        assert kept.min(initial=np.inf) >= dropped.max(initial=0.0)


def test_plans_of_growing_prune_rates_are_nested():
    stats = statistics(L, E, F)
    for planner in PLANNERS:
        keeps = [plan(stats, prune_rate=rate, planner=planner).keep for rate in (0.1, 0.4, 0.8)]
        for larger, smaller in itertools.pairwise(keeps):
            assert not (smaller & ~larger).any()


def test_the_same_inputs_give_the_same_plan_and_the_seed_only_matters_at_random():
    for criterion in ("act", "random"):
        one, two = (plan(criterion=criterion, seed=5) for _ in range(2))
        np.testing.assert_array_equal(one.keep, two.keep)
    np.testing.assert_array_equal(plan(seed=1).keep, plan(seed=2).keep)
    options = {"criterion": "random", "planner": "uniform"}
    assert (plan(seed=1, **options).keep != plan(seed=2, **options).keep).any()
    assert (plan(seed=1, planner="random").keep != plan(seed=2, planner="random").keep).any()


def test_uniform_width_is_one_width_and_reports_what_it_leaves():
    result = plan(criterion="act", prune_rate=0.45, width="uniform", block=4)
    assert (result.counts == 4).all()
    assert result.provenance["budget"] == round(0.55 * 96) == 53
    assert result.provenance["kept"] == 32
    assert result.provenance["unspent"] == 21
    stats = statistics(L, E, F)
    order = np.argsort(-channel_scores(stats, criterion="act").channel, axis=2)
    for place in np.ndindex(L, E):
        assert set(np.flatnonzero(result.keep[place])) == set(order[place][:4])


def test_a_rate_of_its_own_holds_for_the_only_layer_too():
    only = statistics(1, E, F)
    for rate in (0.25, 0.75):
        found = plan(only, prune_rate=rate, layer_rates={0: rate})
        assert found.counts.sum() == (1 - rate) * E * F


def test_layers_share_whole_blocks():
    # 6 blocks and 3 channels that are none: 4.47 and 1.53 blocks, not 5.03 and 1.72
    given = {"channels": 27, "block": 4, "experts_per_token": 1, "planner": "fair"}
    plan = plan_of(statistics(2, 4, 8), layer_shares=np.array([0.745, 0.255]), **given)
    assert plan.keep.sum(axis=(1, 2)).tolist() == [16, 8]


def test_experts_that_go_leave_their_mean_output_if_asked():
    stats, unseen = statistics(L, E, F), statistics(L, E, F, expert_details=False)
    found = plan(stats, width="experts", experts_per_token=1, emptied="mean")
    assert found.constants is not None and (found.counts == 0).any()
    means = np.array(stats.output_sum) / np.array(stats.tokens)[..., None]
    for layer, vectors in enumerate(found.constants):
        gone = [expert for expert in range(E) if found.counts[layer, expert] == 0]
        np.testing.assert_allclose(vectors, [means[layer, expert] for expert in gone], rtol=1e-6)
    assert plan(stats, width="experts", experts_per_token=1).constants is None
    with pytest.raises(ValueError, match="--expert-details"):
        plan(unseen, width="experts", experts_per_token=1, emptied="mean")


def test_a_dead_channel_is_the_first_to_go():
    stats = statistics(L, E, F)
    stats.down_norm[:, :, 5] = 0.0
    assert not plan(stats, criterion="act", prune_rate=1 / F).keep[:, :, 5].any()


def test_coverage_is_the_kept_share_of_the_score():
    keep = np.array([[[True, False], [True, True]]])
    result = PruningPlan(keep, (3,))
    scores = np.array([[[3.0, 1.0], [2.0, 2.0]]])
    np.testing.assert_allclose(result.expert_coverage(scores), [[0.75, 1.0]])
    np.testing.assert_allclose(result.layer_coverage(scores), [7 / 8])
    # Without any score, channels count.
    np.testing.assert_allclose(result.expert_coverage(np.zeros((1, 2, 2))), [[0.5, 1.0]])


def test_a_saved_plan_comes_back_and_has_the_documented_tensors(tmp_path):
    result = plan(layer_indices=np.array([1, 3]), notes={"model_hash": "abc", "n": np.int64(3)})
    result.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["plan.json", "plan.safetensors"]
    tensors = load_file(tmp_path / "out" / "plan.safetensors")
    assert sorted(tensors) == ["keep.1", "keep.3"]
    assert tensors["keep.3"].dtype == np.bool_
    np.testing.assert_array_equal(tensors["keep.3"], result.keep[1])
    content = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert content["counts"] == result.keep.sum(axis=2).tolist()
    assert content["provenance"]["model_hash"] == "abc"
    for path in ("", "plan.json", "plan.safetensors"):
        back = PruningPlan.load(tmp_path / "out" / path)
        np.testing.assert_array_equal(back.keep, result.keep)
        assert back.layer_indices == (1, 3)
        assert back.provenance == {**result.provenance, "n": 3}


def test_a_plan_can_be_saved_under_another_name(tmp_path):
    result = plan()
    result.save(tmp_path / "half.v2.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half.v2.json", "half.v2.safetensors"]
    np.testing.assert_array_equal(PruningPlan.load(tmp_path / "half.v2.json").keep, result.keep)


def test_a_failed_save_keeps_the_old_plan_and_leaves_no_debris(tmp_path):
    old = plan()
    old.save(tmp_path)
    (tmp_path / "blocked.json").mkdir()
    with pytest.raises(OSError):
        plan(prune_rate=0.9).save(tmp_path / "blocked.json")
    assert not list(tmp_path.glob("*.tmp-*"))
    np.testing.assert_array_equal(PruningPlan.load(tmp_path).keep, old.keep)


def test_damaged_or_mixed_plan_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"plan\.json is missing"):
        PruningPlan.load(tmp_path)
    plan().save(tmp_path / "a")
    plan(prune_rate=0.25).save(tmp_path / "b")
    tensors = (tmp_path / "a" / "plan.safetensors").read_bytes()
    (tmp_path / "b" / "plan.safetensors").write_bytes(tensors)
    with pytest.raises(ValueError, match="of different plans"):
        PruningPlan.load(tmp_path / "b")
    (tmp_path / "a" / "plan.safetensors").write_bytes(tensors[:-10])
    with pytest.raises(ValueError, match="no readable plan"):
        PruningPlan.load(tmp_path / "a")
    save_file({"keep.9": np.ones((2, 2), bool)}, tmp_path / "b" / "plan.safetensors")
    with pytest.raises(ValueError, match=r"holds \['keep\.9'\], expected \['keep\.0', 'keep\.1'\]"):
        PruningPlan.load(tmp_path / "b")
    (tmp_path / "a" / "plan.json").write_text("{")
    with pytest.raises(ValueError, match="no readable plan"):
        PruningPlan.load(tmp_path / "a")
    (tmp_path / "a" / "plan.json").write_text("[1]")
    with pytest.raises(ValueError, match="no readable plan"):
        PruningPlan.load(tmp_path / "a")


def test_a_plan_refuses_another_model():
    result = plan(notes={"model_hash": "abc"})
    result.require_model("abc")
    with pytest.raises(ValueError, match="made for model abc, this model is xyz"):
        result.require_model("xyz")


def test_provenance_says_how_the_plan_came_about():
    stats = statistics(L, E, F)
    stats.phi[0, 0] = -1.0
    record = plan(stats, criterion="energy", block=4, minimum=5, seed=9).provenance
    expected = {"criterion": "energy", "attribution": "ala", "planner": "fair", "width": "free"}
    expected |= {"prune_rate": 0.5, "block": 4, "minimum": 8, "seed": 9, "harmful_experts": 1}
    assert expected.items() <= record.items()
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune_rate": 1.5}, r"prune_rate=1\.5 must lie in \[0, 1\)"),
        ({"prune_rate": 1.0}, r"prune_rate=1\.0 must lie"),
        ({"prune_rate": -0.1}, r"prune_rate=-0\.1 must lie"),
        ({"prune_rate": float("nan")}, "prune_rate=nan must lie"),
        ({"block": 5}, r"block=5 does not divide the expert width 12.*\[1, 2, 3, 4, 6, 12\]"),
        ({"block": 0}, "block=0 must be at least 1"),
        ({"minimum": 13}, r"minimum=13 must lie in \[1, 12\]"),
        ({"minimum": 0}, r"minimum=0 must be at least 1"),
        ({"experts_per_token": 5}, r"experts_per_token=5 must lie in \[1, num_experts=4\]"),
        ({"prune_rate": 0.9, "block": 4}, "budget of 10 channels is below the 16"),
        ({"prune_rate": 0.9, "width": "uniform", "block": 2}, "uniform width of 0 of 12"),
        ({"width": "uniforn"}, "width='uniforn' is unknown; did you mean 'uniform'"),
        ({"planner": "papr"}, "planner='papr' is unknown; did you mean 'paper'"),
        ({"criterion": "x"}, "criterion='x' is unknown"),
        ({"layer_indices": [0, 1, 2]}, "must be 2 different model layers"),
        ({"layer_indices": [3, 1]}, "ascending order"),
        ({"layer_indices": [-1, 1]}, "ascending order"),
    ],
)
def test_bad_options_name_value_and_expectation(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_keep_mask_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match=r"keep is float64\[2, 3, 4\], expected bool \[L, E, F\]"):
        PruningPlan(np.ones((2, 3, 4)), (0, 1))
    with pytest.raises(ValueError, match=r"keep is bool\[2, 3\]"):
        PruningPlan(np.ones((2, 3), bool), (0, 1))
