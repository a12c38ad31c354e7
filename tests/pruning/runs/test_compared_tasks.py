"""Which results of a comparison are asked tasks, of what model, and what is kept: no model runs."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from pruning.recipe.task_options import TaskOptions
from pruning.report.compared import UNPRUNED, Result
from pruning.report.comparison import Comparison
from pruning.runs import compared_tasks
from pruning.runs.compared_task import task_of
from pruning.runs.compared_tasks import ask_plans

PLAIN = Result("fair", 0.5)
RESULTS = {
    "plain": PLAIN,
    "seed": dataclasses.replace(PLAIN, seed=3),
    "repaired in 4 bits": dataclasses.replace(PLAIN, repair="layer", bits=4),
    "at a size": dataclasses.replace(PLAIN, target=5_000_000),
    "whole in 4 bits": Result(UNPRUNED, 0.0, bits=4),
    "router cut": dataclasses.replace(PLAIN, cut=True),
    "merged": Result("ream", 0.5, bits=8),
    # of these nothing is asked
    "dense": Result(UNPRUNED, 0.0),
    "draw": dataclasses.replace(PLAIN, draw=1),
    "set": dataclasses.replace(PLAIN, calibration="web"),
    "fewer": Result(UNPRUNED, 0.0, top_k=2),
    "no budget": Result("unplanned", 0.5),
}
ASKED = tuple(RESULTS)[:7]
HOW = {"window": None, "first_tokens": "model's", "batch": 4, "dtype": "f32"}


@pytest.fixture
def world(monkeypatch, tmp_path):
    """A job, and in `calls` each model that was asked."""
    recipe = SimpleNamespace(first_tokens="model's", batch=4, dtype="f32", group_size=32)
    job: Any = SimpleNamespace(recipe=recipe, output=tmp_path, base="base", dtype="f32")
    calls = []

    def ask(model, loaded, folder, asked, how, steps):
        assert (loaded, folder, how) == ({"t": "task"}, tmp_path / "tasks", HOW)
        calls.append((model, asked))
        return {"results": {"of": model.source}}

    @contextmanager
    def repaired(job, plan, how):
        yield f"{how} of {plan.content_hash}"

    def plan(job, *given):
        statistics, provenance, task, budget = given
        assert (statistics, provenance) == ("statistics", {"noted": 1})
        return SimpleNamespace(content_hash=f"{task.rule}-{task.seed}-{budget}" + " cut" * task.cut)

    def mergings(job, statistics, tasks, budgets):
        (task,) = tasks
        assert statistics == "statistics" and budgets[task] == 7
        plan = SimpleNamespace(content_hash="leaders")
        return {task: SimpleNamespace(plan=plan)}, []

    def compare_results(dense, other):
        row = {"dense": dense["of"], "other": other["of"]}
        return [SimpleNamespace(to_dict=lambda: row)]

    monkeypatch.setattr(compared_tasks, "ask", ask)
    monkeypatch.setattr(compared_tasks, "repaired", repaired)
    monkeypatch.setattr(compared_tasks, "task_plan", plan)
    monkeypatch.setattr(compared_tasks, "compare_results", compare_results)
    monkeypatch.setattr(
        compared_tasks, "PrunedSource", lambda base, plan: f"{base}/{plan.content_hash}"
    )
    monkeypatch.setattr(compared_tasks, "mergings", mergings)
    monkeypatch.setattr(compared_tasks, "MergedSource", lambda base, how: f"{base} merged")
    monkeypatch.setattr(
        compared_tasks, "rounded", lambda source, job, plan, bits: f"{source}:{bits}"
    )

    def run(found: Comparison, **options) -> list[Comparison]:
        budgets = {task_of(one): 7 for one in found.results if one.rule != "unplanned"}
        asked = TaskOptions(tasks=("t",), **options)
        whole: Any = ("statistics", {"noted": 1})
        steps: Any = None
        return list(ask_plans(job, whole, budgets, found, asked, {"t": "task"}, steps))

    return SimpleNamespace(run=run, calls=calls)


def comparison(*names: str) -> Comparison:
    return Comparison({"calibration": "text"}, {}, tuple(RESULTS[name] for name in names), ())


def test_every_plan_of_the_calibration_text_is_asked_after_the_dense_model(world):
    *before, found = world.run(comparison(*RESULTS))
    assert len(before) + 1 == len(ASKED)
    # What is yielded is kept: one more is answered each time.
    answered = [sum(bool(one.tasks) for one in some.results) for some in (*before, found)]
    assert answered == [1, 2, 3, 4, 5, 6, 7]
    rows = {name: one.tasks for name, one in zip(RESULTS, found.results, strict=True)}
    others = dict(zip(ASKED, ["base/fair-0-7:16", "base/fair-3-7:16", "layer of fair-0-7:4",
                              "base/fair-0-7:16", "base/unpruned-0-7:4",
                              "base/fair-0-7 cut:16", "base merged:8"],
                      strict=True))  # fmt: skip
    assert rows == {
        name: [{"dense": "base", "other": others[name]}] if name in others else []
        for name in RESULTS
    }
    told = [(model.name, model.plan) for model, _ in world.calls]
    assert told == [
        ("dense", ""),
        ("fair at 0.5", "fair-0-7 16 32"),
        ("fair at 0.5 seed 3", "fair-3-7 16 32"),
        ("fair+layer 4-bit at 0.5", "fair-0-7 4 32 layer text"),
        ("fair at 5.0 MB", "fair-0-7 16 32"),
        ("unpruned 4-bit at 0", "unpruned-0-7 4 32"),
        ("fair+cut at 0.5", "fair-0-7 cut 16 32"),
        ("ream 8-bit at 0.5", "leaders 8 32 ream text"),
    ]


def test_what_was_asked_is_not_asked_again_and_another_question_drops_all_answers(world):
    *_, found = world.run(comparison("plain", "seed"))
    world.calls.clear()
    assert world.run(found) == [] and not world.calls
    assert found.asked == {"tasks": ["t"], "fewshot": None, "limit": None, "task_path": None}
    half = dataclasses.replace(found, results=(found.results[0], RESULTS["seed"]))
    assert [one.results for one in world.run(half)] == [found.results]
    assert [model.name for model, _ in world.calls] == ["dense", "fair at 0.5 seed 3"]
    for option in ({"fewshot": 1}, {"limit": 5}, {"task_path": "demo"}):
        first, *_ = world.run(found, **option)
        assert [bool(one.tasks) for one in first.results] == [True, False]
        assert first.asked == {**found.asked, **option}
