"""Merged experts as rows of a comparison: what they are, what they take, when they are refused."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.checkpoint import open_checkpoint
from moe_jax.stream import forward_hidden
from pruning.budget.merging import MERGES
from pruning.cli import control_flags
from pruning.measure.quality import measure_quality
from pruning.report.comparison import Comparison
from pruning.runs import compared_tasks, merged, plan_groups
from pruning.runs.controls import Task
from pruning.scores.statistics import load_statistics
from pruning.shrink.merge import MergedLayer, MergedSource, Merging
from pruning.stages.measure import first_tokens
from tests.support import command


def asked(models, texts, out, *more) -> tuple:
    good = texts / "good.txt"
    return ("--quiet", "compare", models / "single", "--calibration", good, "--evaluation", good,
            "--evaluation-tokens", 60, "--batch", 4, "--block", 32, "--output", out, "--rules",
            "experts-usage", "--prune-rate", 0.5, *more)  # fmt: skip


@pytest.fixture(scope="module")
def out(models, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "out"
    assert command.run(*asked(models, texts, out, "--merge", "m-smoe", "ream")) == 0
    return out


def test_merged_experts_are_rows_beside_the_rules_at_their_size(out, models):
    found = Comparison.load(out / "compare.json")
    rows = {result.rule: result for result in found.results}
    assert list(rows) == ["experts-usage", "m-smoe", "ream"] and not found.refused
    dropped = rows.pop("experts-usage")
    sizes = {n: t.size for n, t in load_file(models / "single" / "model.safetensors").items()}
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    always = sum(sizes.values()) - routed - sizes["model.embed_tokens.weight"]
    whole, one = always + routed // 4, always + routed // 8  # a token goes to two of eight
    for result in rows.values():
        assert (result.kept, result.emptied) == (dropped.kept, 8) == (8 * 64, 8)
        assert (result.bytes, result.parameters) == (
            dropped.bytes,
            sum(sizes.values()) - routed // 2,
        )
        assert result.family == "merged experts" and result.about == MERGES[result.rule].about
        assert result.active_bytes == pytest.approx(2 * result.active)
    assert rows["ream"].active == whole and one < rows["m-smoe"].active < whole
    page = (out / "compare.html").read_text()
    assert "m-smoe" in page and "Merged experts count once: a class of models" in page
    assert (out / "compare.csv").read_text().count("\nream,merged experts,0.5,0,512,8,good,") == 1


def test_a_row_is_the_loss_of_the_model_that_its_rule_merges(out, models, texts, capsys):
    found = Comparison.load(out / "compare.json")
    job = merged_job(models, texts, out)
    statistics, _ = load_statistics(out / "statistics.safetensors")
    task = Task("m-smoe", 0.5)
    ((_, merging),), refused = (lambda m, r: (m.items(), r))(
        *merged.mergings(job, statistics, [task], {task: 512})
    )
    assert not refused
    usage = np.sort(statistics.tokens.ravel())[-8:]
    leads = merging.plan.keep.any(axis=2)
    assert sorted(statistics.tokens[leads].tolist()) == usage.tolist()
    windows = first_tokens(job.evaluation["good"], 60)
    source = MergedSource(job.base, merging)
    hidden = forward_hidden(source, windows.tokens, windows.valid, batch=4)
    quality = measure_quality(job.base.head, hidden, windows)
    (row,) = (r for r in found.results if r.rule == "m-smoe")
    assert row.quality["good"]["nll"] == pytest.approx(quality.nll, rel=1e-5)


def test_what_was_measured_is_not_planned_again(out, models, texts, monkeypatch):
    monkeypatch.setattr(plan_groups, "_run_group", None)
    before = (out / "compare.json").read_bytes()
    assert command.run(*asked(models, texts, out, "--merge", "m-smoe", "ream")) == 0
    assert (out / "compare.json").read_bytes() == before


def test_what_cannot_be_merged_is_refused_before_anything_is_scored(
    models, texts, tmp_path, capsys
):
    def said(*more) -> str:
        return command.refused(capsys, tmp_path, *asked(models, texts, tmp_path / "out", *more))

    assert "merge='reem' is unknown; did you mean 'ream'" in said("--merge", "reem")
    little = said("--merge", "all", "--max-tokens", 5)
    assert "merging compares 8 experts by what they do on at least as many tokens, there" in little
    assert "or leave --merge away" in little


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
