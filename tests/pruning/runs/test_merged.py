"""Merged experts as rows of a comparison: what they are, what they take, when they are refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moe_jax.errors import InputError
from pruning.budget.merging import MERGES
from pruning.budget.plan import PruningPlan
from pruning.cli import control_flags
from pruning.measure.quality import measure_quality
from pruning.recipe.recipe import load_recipe
from pruning.runs import compared_tasks, merged
from pruning.runs.compared_task import Task
from pruning.scores.statistics import load_statistics
from pruning.shrink.merge import MergedLayer, Merging
from pruning.stages.export import pruned_source
from pruning.stages.job import open_job


@pytest.fixture(scope="module")
def rows(scored, models, tmp_path_factory):
    """Two rules on the scored model without a comparison around them."""
    output = str(tmp_path_factory.mktemp("merged"))
    recipe = load_recipe(scored / "recipe.yaml", planner="fair", repair="none", output=output)
    job = open_job(recipe)
    statistics, _ = load_statistics(scored / "statistics.safetensors")
    tasks = [Task("m-smoe", 0.5), Task("ream", 0.5)]
    budgets, references, visited = dict.fromkeys(tasks, 8 * 64), {}, []
    ((name, windows),) = job.evaluation.items()
    dense, references[name] = measure_quality(job.base, windows, batch=4)
    given = (job, statistics, tasks, budgets, job.evaluation, references, visited.append)
    found, refused = merged.run_merges(*given)
    assert not refused and visited == [-1, 0, 1, 1]  # half of the work is planning
    return job, statistics, budgets, found, dense


def test_a_row_is_the_loss_of_the_model_that_its_rule_merges(rows):
    job, statistics, budgets, found, dense = rows
    (task, _) = budgets
    merging = merged.mergings(job, statistics, [task], budgets)[0][task]
    leads = merging.plan.keep.any(axis=2)
    most = np.sort(statistics.tokens.ravel())[-8:]
    assert sorted(statistics.tokens[leads].tolist()) == most.tolist()
    # What is left for `apply` is the model of the row.
    plans = {rule: PruningPlan.load(job.output / "merged" / f"{rule}-0.5") for rule in
             ("m-smoe", "ream")}  # fmt: skip
    assert plans["m-smoe"].keep.all() and not plans["m-smoe"].cut_router
    assert plans["ream"].cut_router and plans["ream"].counts.tolist() == [
        [64 if expert in np.unique(one.leaders) else 0 for expert in range(8)]
        for one in plans["ream"].merged
    ]
    source = pruned_source(job.base, plans["m-smoe"], None)
    ((name, windows),) = job.evaluation.items()
    quality, _ = measure_quality(source, windows, batch=4)
    assert found[0].quality[name]["nll"] == pytest.approx(quality.nll, rel=1e-5)
    assert min(abs(one.quality[name]["nll"] - dense.nll) for one in found) > 1e-3


def test_sizes_of_a_row_are_those_of_unique_experts(rows, models):
    found = rows[3]
    sizes = {n: t.size for n, t in load_file(models / "single" / "model.safetensors").items()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    always = sum(sizes.values()) - routed - sizes["model.embed_tokens.weight"]
    whole, one = always + routed // 4, always + routed // 8  # a token goes to two of eight
    for row in found:
        assert (row.kept, row.emptied, row.family) == (8 * 64, 8, "merged experts")
        assert row.about == MERGES[row.rule].about
        assert row.parameters == sum(sizes.values()) - routed // 2
        assert row.active_bytes == pytest.approx(2 * row.active)
        assert 0 < row.bytes - 2 * row.parameters < 10_000
    # Of a group that is met twice there is one; a cut router sends a token to two different ones.
    assert found[1].active == whole and one < found[0].active < whole


def test_fewer_tokens_than_experts_say_nothing_of_them(models):
    moe = SimpleNamespace(num_experts=9)
    text = SimpleNamespace(valid=np.arange(12) % 3 > 0)
    job: Any = SimpleNamespace(
        base=SimpleNamespace(config=SimpleNamespace(moe=moe)), calibration=text
    )
    with pytest.raises(InputError, match=r"compares 9 experts .* there are 8; give more --calib"):
        merged.require_tokens(job)
    moe.num_experts = 8
    merged.require_tokens(job)


def test_every_rule_is_named_by_the_help():
    found: list[str] = []
    control_flags.add_controls(
        SimpleNamespace(add_argument=lambda *names, **given: found.append(str(given["help"])))
    )
    assert any(all(f"{name}," in about for name in MERGES) for about in found)


# --- parts ---

EVEN = np.zeros((2, 4))


def made_up(monkeypatch, experts_per_token: int = 2) -> Any:
    """A job whose merges are not planned but told."""
    given: list[Any] = []

    def plan_merges(base, rules, usage, tokens, valid, *, batch, dtype, on_layer):
        given.append((base, rules, usage, tokens, valid, batch, dtype, on_layer))
        return [f"merging {number}" for number in range(len(rules))]

    monkeypatch.setattr(merged, "plan_merges", plan_merges)
    moe = SimpleNamespace(d_expert=3, experts_per_token=experts_per_token, num_experts=4)
    text = SimpleNamespace(tokens=np.arange(160).reshape(20, 8), valid=np.ones((20, 8), bool))
    return SimpleNamespace(
        base=SimpleNamespace(config=SimpleNamespace(moe=moe)), calibration=text, dtype="f32",
        recipe=SimpleNamespace(batch=7), given=given,
    )  # fmt: skip


def test_all_bits_of_a_rule_at_a_rate_are_one_merging_and_refusals_stop_no_other(monkeypatch):
    job = made_up(monkeypatch)
    assert merged.SAMPLE == 32_768
    tasks = [Task(name, rate, bits=bits) for rate in (0.5, 0.875) for name in ("ream", "hc-smoe")
             for bits in (16, 4)]  # fmt: skip
    budgets = {task: 12 if task.rate == 0.5 else 6 for task in tasks}
    statistics: Any = SimpleNamespace(tokens=EVEN)
    found, refused = merged.mergings(job, statistics, tasks, budgets, "told")
    assert found == {task: f"merging {('ream', 'hc-smoe', '').index(task.rule) + (task.rate > 0.5)}"
                     for task in tasks if (task.rule, task.rate) != ("ream", 0.875)}  # fmt: skip
    assert [(r.rule, r.rate, r.bits) for r in refused] == [("ream", 0.875, 16), ("ream", 0.875, 4)]
    assert all("fewer than the 2 that its router needs" in r.reason for r in refused)
    ((base, rules, usage, tokens, valid, *how),) = job.given
    assert base is job.base and usage is EVEN and how == [7, "f32", "told"]
    assert [(rule, counts.tolist()) for rule, counts in rules] == [
        (MERGES["ream"], [2, 2]), (MERGES["hc-smoe"], [2, 2]), (MERGES["hc-smoe"], [1, 1])
    ]  # fmt: skip
    np.testing.assert_array_equal(tokens, job.calibration.tokens)
    assert valid.all() and valid.shape == tokens.shape
    # Of a long text a part; and where nothing can be merged the weights are not read.
    monkeypatch.setattr(merged, "SAMPLE", 40)
    merged.mergings(job, statistics, tasks[:1], budgets)
    np.testing.assert_array_equal(job.given[1][3], job.calibration.tokens[::4])
    assert job.given[1][5] == 5
    job = made_up(monkeypatch, experts_per_token=3)
    assert merged.mergings(job, statistics, tasks[:1], budgets)[0] == {} and not job.given


def test_tasks_are_asked_of_the_merged_model(monkeypatch):
    leaders = np.array([0, 0, 2, 2])
    layer = MergedLayer(leaders, np.full(4, 0.5), np.zeros((4, 3), int), False)
    merging, task = Merging({1: layer, 4: layer}), Task("hc-smoe", 0.5)

    def mergings(job, statistics, tasks, budgets):
        assert (job.base, statistics, tasks, budgets) == ("base", "sums", [task], {task: 12})
        return {task: merging}, []

    monkeypatch.setattr(compared_tasks, "mergings", mergings)
    monkeypatch.setattr(compared_tasks, "MergedSource", lambda *given: given)
    job: Any = SimpleNamespace(base="base")
    whole: Any = ("sums", {})
    plan, model = compared_tasks._model_of(job, whole, task, {task: 12})
    assert plan.keep.any(axis=2).tolist() == [[True, False, True, False]] * 2
    assert plan.keep.all(axis=2).sum() == 4 and plan.layer_indices == (1, 4)
    with model as source:
        assert source == ("base", merging)
