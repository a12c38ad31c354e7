"""What planner auto says of its choice, from losses made up beforehand: nothing is run."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from moe_jax.errors import InputError
from pruning.budget.candidates import CANDIDATES, candidate
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.stages import plan as planning
from pruning.stages.choose import choose, job_plan, measurable
from pruning.stages.job import resolved
from pruning.stages.rule_losses import CHOICE
from tests.pruning.measure.test_choice import plain
from tests.support.synthetic import statistics
from tests.support.told import Told

TOKENS, FILES = [5, 7, 4, 6, 0], [0, 1, 2, 0, 2]
NAMES = {"words": 0, "digits": 1, "words.txt": 2}  # of the texts, told apart
STEPS = Steps(quiet=True)


def source(path: str) -> dict:
    return {"path": path, "sha256": "ab", "weight": 1.0, "documents": 1, "tokens": 9}


class Asked:
    """A recipe of a tiny model, statistics made up, and the plans of all rules."""

    def __init__(self, model, out):
        out.mkdir()
        self.base = open_checkpoint(model)
        recipe = CompressionRecipe(model=str(model), output=str(out), calibration=("a.txt",),
                                   bits=16, block=8, prune_rate=0.5)  # fmt: skip
        self.recipe = resolved(recipe, self.base.about)
        c = self.base.config
        self.statistics = statistics(len(c.moe_layers), c.moe.num_experts, c.moe.d_expert,
                                     expert_details=False)  # fmt: skip
        self.kept_out = {"windows": 5, "tokens": 30, "sha256": "cd"}
        texts = [source(path) for path in ("/a/words.txt", "/b/digits.txt", "/c/words.txt")]
        self.provenance = {"model_hash": self.base.fingerprint, "kept_out": self.kept_out,
                           "sources": texts}  # fmt: skip
        self.file = out / CHOICE
        self.plans = {}
        groups = frozenset(self.statistics.groups)
        for name, rule in CANDIDATES.items():
            one = candidate(rule, self.recipe, groups)
            made = (self.statistics, self.provenance, self.base.about)
            self.plans[name] = planning.plan(one, *made)
        self.first = {}  # hash -> the first rule that keeps this
        for name, plan in self.plans.items():
            self.first.setdefault(plan.content_hash, name)

    def remember(self, seed: int) -> dict:
        rng, some = np.random.default_rng(seed), np.array(TOKENS) > 0
        dense = some * rng.uniform(1, 2, 5)
        added = some * rng.uniform(0.5, 1, 5)
        plans = {h: (dense + added + some * rng.normal(0, 0.02, 5)).tolist() for h in self.first}
        key = {"model_hash": self.base.fingerprint, "dtype": self.recipe.dtype, "repaired": True}
        key |= self.kept_out
        stored = {"key": key, "dense": dense.tolist(), "plans": plans, "tokens": TOKENS,
                  "files": FILES}  # fmt: skip
        self.file.write_text(json.dumps(stored))
        return stored

    def choose(self):
        made = ([self.recipe], self.statistics, self.provenance, self.base)
        nothing: Any = SimpleNamespace(kept_out=None)
        return choose(*made, lambda: nothing, STEPS)


@pytest.fixture
def asked(models, tmp_path):
    return Asked(models / "single", tmp_path / "out")


def per_token(losses, dense, rows) -> float:
    return sum(losses[i] - dense[i] for i in rows) / sum(TOKENS[i] for i in rows)


def test_the_choice_says_what_was_measured(asked):
    taken_of_tied = 0
    for seed in range(6):
        stored = asked.remember(seed)
        ((recipe, plan),) = asked.choose()
        losses = {name: stored["plans"][h] for h, name in asked.first.items()}
        name, tied = plain(losses, stored["dense"], TOKENS, FILES)
        taken_of_tied += len(tied) > 1
        assert plan.content_hash == asked.plans[name].content_hash
        rule = CANDIDATES[name].options
        assert (recipe.criterion, recipe.planner) == (rule.used_criterion, rule.used_planner)
        said = plan.provenance["choice"]
        means = {n: per_token(losses[n], stored["dense"], range(5)) for n in losses}
        assert [one["rule"] for one in said["candidates"]] == sorted(means, key=means.__getitem__)
        for one in said["candidates"]:
            assert one["mean"] == pytest.approx(means[one["rule"]])
            assert one["added"] == {
                text: pytest.approx(per_token(
                    losses[one["rule"]], stored["dense"], [i for i in range(5) if FILES[i] == file]
                )) for text, file in NAMES.items()
            }  # fmt: skip
            assert one["kept"] == asked.plans[one["rule"]].counts.sum()
            assert (one["tied"], one["taken"]) == (one["rule"] in tied, one["rule"] == name)
        again = set(CANDIDATES) - set(losses)
        assert {one["rule"]: one["reason"] for one in said["refused"]} == {
            n: f"it keeps the channels of {asked.first[asked.plans[n].content_hash]}" for n in again
        }
        assert said["repaired"]
        assert said["asked"] == {"planner": "auto", "width": "free", "prune_rate": 0.5}
        assert said["kept_out"] == {**asked.kept_out, "predictions": 22}
        assert said["dense"] == {
            text: pytest.approx(per_token(stored["dense"], [0] * 5,
                                          [i for i in range(5) if FILES[i] == file]))
            for text, file in NAMES.items()
        }  # fmt: skip
    assert taken_of_tied


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s["key"].update(model_hash="other"),
        lambda s: s["key"].update(sha256="other"),
        lambda s: s["key"].update(repaired=False),
        lambda s: s.pop("dense"),
        lambda s: s.update(tokens=TOKENS[:4]),
        lambda s: s.update(tokens=[0] * 5),
        lambda s: s.update(tokens=[-1, *TOKENS[1:]]),
        lambda s: s.update(files=["a"] * 5),
        lambda s: s.update(files=[-1, *FILES[1:]]),
        lambda s: s["plans"].update({next(iter(s["plans"])): [1.0] * 4}),
        lambda s: s["plans"].popitem(),  # only that one is missing
    ],
)
def test_losses_of_something_else_are_not_taken(asked, damage):
    stored = asked.remember(0)
    damage(stored)
    asked.file.write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"is not the one that .* was scored on"):
        asked.choose()


def test_without_windows_kept_out_the_usual_rule_decides(asked, capsys):
    assert measurable(asked.recipe, asked.provenance, STEPS) == asked.recipe
    usual = measurable(asked.recipe, {"model_hash": "ab"}, Steps())
    assert (usual.criterion, usual.planner) == ("shapley", "fair")
    shown = " ".join(capsys.readouterr().err.split())
    assert (
        "--criterion shapley --attribution ala --planner fair; to measure rules, score 4" in shown
    )
    for damaged in (3, [], {"tokens": 5}):
        with pytest.raises(InputError, match=r"kept_out=.*statistics\.json; score again"):
            measurable(asked.recipe, {"kept_out": damaged}, STEPS)
    named = asked.recipe.fixed()
    assert measurable(named, {"model_hash": "ab"}, STEPS) == named


@dataclasses.dataclass
class Task:
    recipe: Any
    base: Any


def test_a_rule_that_is_named_is_planned_and_one_that_is_not_is_chosen(asked):
    asked.remember(0)
    steps = Told()
    job, plan = job_plan(Task(asked.recipe, asked.base), asked.statistics, asked.provenance, steps)
    ((recipe, chosen),) = asked.choose()
    assert job.recipe == recipe and plan.content_hash == chosen.content_hash
    assert [stage["name"] for stage in steps.stages] == ["plan by every rule"]
    (line,) = steps.lines
    (row,) = (row for row in plan.provenance["choice"]["candidates"] if row["taken"])
    assert line.startswith(f"rule {row['rule']} is taken, {row['mean']:+.4f} nats per token on "
                           "text kept out once repaired: --criterion ")  # fmt: skip
    named = dataclasses.replace(asked.recipe.fixed(), criterion="act")
    steps = Told()
    job, plan = job_plan(Task(named, asked.base), asked.statistics, asked.provenance, steps)
    made = planning.plan(named, asked.statistics, asked.provenance, asked.base.about)
    assert job.recipe == named and plan.content_hash == made.content_hash
    assert "choice" not in plan.provenance and not steps.lines
    assert [stage["name"] for stage in steps.stages] == ["plan"]


def test_every_rate_has_a_choice_of_its_own(asked):
    stored = asked.remember(1)
    other = dataclasses.replace(asked.recipe, prune_rate=0.25)
    rng = np.random.default_rng(3)
    for rule in CANDIDATES.values():
        one = candidate(rule, other, frozenset(asked.statistics.groups))
        plan = planning.plan(one, asked.statistics, asked.provenance, asked.base.about)
        stored["plans"].setdefault(plan.content_hash, (4 * rng.random(5)).tolist())
    asked.file.write_text(json.dumps(stored))
    steps = Told()
    nothing: Any = SimpleNamespace(kept_out=None)
    made = (asked.statistics, asked.provenance, asked.base, lambda: nothing, steps)
    (_, first), (_, second) = choose([asked.recipe, other], *made)
    assert first.provenance["prune_rate"] == 0.5 and second.provenance["prune_rate"] == 0.25
    assert first.content_hash == asked.choose()[0][1].content_hash
    assert [line.partition(" is taken")[0].rpartition(" ")[0] for line in steps.lines] == [
        "prune rate 0.5: rule", "prune rate 0.25: rule"
    ]  # fmt: skip
    for plan, line in zip((first, second), steps.lines, strict=True):
        (row,) = (row for row in plan.provenance["choice"]["candidates"] if row["taken"])
        assert f"rule {row['rule']} is taken, {row['mean']:+.4f} nats" in line
        options = line.rpartition(": ")[2].split()
        assert options[::2] == ["--criterion", "--attribution", "--planner", *options[6::2]]
        assert options[1] == plan.provenance["criterion"]
        planner = plan.provenance["planner"]  # None where one width for all decides alone
        assert options[5] == planner or (options[6:] == ["--width", "uniform"] and planner is None)


def test_where_no_rule_can_the_first_reason_is_given(asked):
    asked.remember(0)
    tight = dataclasses.replace(asked.recipe, prune_rate=0.999)
    made = (asked.statistics, asked.provenance, asked.base)
    nothing: Any = SimpleNamespace(kept_out=None)
    with pytest.raises(InputError, match="budget of"):
        choose([tight], *made, lambda: nothing, STEPS)


def test_a_rule_that_cannot_is_refused_and_texts_without_a_prediction_are_left_out(
    asked, monkeypatch
):
    stored = asked.remember(2)
    true = planning.plan

    def plan(recipe, *given):
        if recipe.used_criterion == "act":
            raise InputError("not this one")
        return true(recipe, *given)

    monkeypatch.setattr("pruning.stages.choose.planning.plan", plan)
    stored["tokens"], stored["files"] = [5, 7, 4, 6, 0], [0, 7, 7, 0, 1]
    asked.file.write_text(json.dumps(stored))
    ((_, found),) = asked.choose()
    choice = found.provenance["choice"]
    refused = {row["rule"]: row["reason"] for row in choice["refused"]}
    acts = [name for name, rule in CANDIDATES.items() if rule.options.used_criterion == "act"]
    assert acts and all(refused[name] == "not this one" for name in acts)
    # Of a file that is unknown it is only known that it is a text.
    assert list(choice["dense"]) == ["words", "text"]
