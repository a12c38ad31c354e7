"""How a comparison groups its tasks, counts its steps and names its results: no model runs."""

import dataclasses
import json
import re
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.spread import ALONE, Spread
from pruning.budget.plan import PruningPlan
from pruning.budget.rules import RULES
from pruning.kit.errors import BudgetError
from pruning.recipe.recipe import CompressionRecipe
from pruning.report.compared import Result
from pruning.runs import compare as comparing
from pruning.runs import compared, compared_job, plan_groups
from pruning.runs.compare import compare
from pruning.runs.compared_task import Task
from pruning.text.windows import make_windows, text_hashes
from tests.support.told import Told

LAYERS, D = 3, 4
SHAPE = (2, 4, 8)  # layers with experts, experts, channels


class Base:
    fingerprint = "abc"
    head = "the head"
    config = SimpleNamespace(
        moe_layers=(0, 2), d_model=D,
        moe=SimpleNamespace(num_experts=4, d_expert=8, experts_per_token=2),
    )  # fmt: skip

    def __init__(self):
        # A weight a channel, and 100 others.
        widths = ((8,) * 4, (), (8,) * 4)
        count = lambda widths: 100 + sum(map(sum, widths))  # noqa: E731
        self.about = SimpleNamespace(
            widths=widths, weights=lambda given=None: count(widths if given is None else given)
        )

    def __len__(self):
        return LAYERS


def words(tokens: int, start: int = 0):
    return make_windows(np.arange(start, start + tokens), window=8, stride=4)


SOURCES = ({"path": "/a", "sha256": "x", "loss_on": "answers"}, {"path": "/b", "first": [1]})
QUALITY = {"nll": 2.0, "kl": 0.1, "top1": 0.5, "tokens": 9}


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A comparison whose model is made up, and all that its parts were asked."""
    tokens = np.arange(40).reshape(5, 8)
    job: Any = SimpleNamespace(
        base=Base(), output=tmp_path, dtype=np.float32,
        evaluation={"one": words(20), "two": words(30, 7)},
        calibration=SimpleNamespace(tokens=tokens, valid=tokens % 3 > 0, sources=SOURCES),
    )  # fmt: skip
    found = SimpleNamespace(job=job, opened=[], plans=[], groups=[], repaired=[], refuse=set(),
                            stored=[], cut=[], prepared=[], saved=[], shares={})  # fmt: skip

    def open_job(recipe, *, measures):
        assert measures
        found.opened.append(recipe)
        given = dict(vars(job))
        evaluation = given.pop("evaluation")
        return Job(**given, recipe=recipe, evaluation=evaluation)

    def task_plan(job, statistics, provenance, task, budget):
        assert (statistics, provenance) == ("statistics", {"tokens": 3})
        found.plans.append((task, budget))
        if task.rule in found.refuse:
            raise BudgetError("too small")
        keep = np.arange(64).reshape(SHAPE) < budget
        plan = PruningPlan(keep, (0, 2))
        return plan.with_cut_router() if task.cut else plan

    def masked_hidden(base, tokens, valid, plans, *, storages, fewer, routed, group_size,
                      batch, dtype, on_layer):  # fmt: skip
        found.stored.append(storages)
        found.cut.append([plan.cut_router for plan in plans])
        routed += [0 if one is None else one.top_k * 6 for one in fewer]
        found.groups.append((len(plans), batch, tokens, valid))
        for layer in range(LAYERS):
            on_layer(layer)
        return np.full((len(plans), *tokens.shape, D), len(found.groups), np.float32)

    def repaired_hidden(job, plan, mode, bits, text, on_layer):
        found.repaired.append((int(plan.keep.sum()), mode))
        for layer in range(LAYERS):
            on_layer(layer)
        return [np.zeros((*text[0].shape, D)) for _ in bits]

    def task_result(task, plan, job, states, texts, references, shares):
        found.shares[task] = shares
        assert states.shape[1:] == (8, D) and references == {"one": 1, "two": 2}
        return Result(**dataclasses.asdict(task), kept=int(plan.keep.sum()),
                      quality=dict.fromkeys(texts, QUALITY))  # fmt: skip

    def measure(base, texts, references, steps, name, *, batch, dtype):
        assert (name, batch, dtype) == ("dense", 3, np.float32)
        references |= {"one": 1, "two": 2}
        return {text: SimpleNamespace(to_dict=lambda: QUALITY) for text in texts}

    monkeypatch.setattr(compared_job, "open_job", open_job)
    opened = {"identify": lambda *given: None, "measure": measure}
    run = {"task_plan": task_plan, "masked_hidden": masked_hidden,
           "repaired_hidden": repaired_hidden, "task_result": task_result,
           "token_shares": lambda about, statistics: np.full((2, 4), 0.5)}  # fmt: skip
    for module, patched in ((comparing, opened), (plan_groups, run)):
        for name, value in patched.items():
            monkeypatch.setattr(module, name, value)

    def scored(job, steps, prepare, more):
        prepare()
        return "statistics", {"tokens": 3}

    monkeypatch.setattr(comparing, "scored", scored)
    monkeypatch.setattr(comparing.preflight, "prepare",
                        lambda *given, **options: found.prepared.append(options))  # fmt: skip
    monkeypatch.setattr(comparing.comparison_page, "save",
                        lambda shown, folder: found.saved.append((shown, folder)))  # fmt: skip
    return found


@dataclasses.dataclass
class Job:
    recipe: CompressionRecipe
    base: Base
    output: Path
    dtype: Any
    calibration: Any
    evaluation: dict
    spread: Spread = ALONE


def run(asked, rates=(0.5,), rules=("uniform-act", "random"), steps=None, repair=None, top_k=(),
        merges=(), cut_router=False, **changes):  # fmt: skip
    given = {"model": "m", "output": str(asked.job.output), "batch": 3, "window": 8, "block": 2,
             "planner": "auto", "dtype": "float32", **changes}  # fmt: skip
    return compare(CompressionRecipe(**given), rates, rules, repair=repair, top_k=top_k,
                   merges=merges, cut_router=cut_router, steps=steps or Told())  # fmt: skip


def test_the_recipe_is_opened_for_16_bits_with_one_window_more_than_is_measured(asked):
    run(asked, bits=4, export=("ragged-int4",), repair="layer")
    (recipe,) = asked.opened
    assert (recipe.bits, recipe.export, recipe.repair) == (16, (), "none")
    assert recipe.planner != "auto" and recipe.evaluation_tokens == 4096 + 8
    run(asked, evaluation_tokens=100, window=None, overwrite=True)
    assert asked.opened[1].evaluation_tokens == 100 + 2048
    assert asked.prepared == [{"exports": False, "last": comparing.comparison_page.PAGE}] * 2


def test_texts_end_with_the_window_of_the_last_token_wanted(asked):
    run(asked, evaluation_tokens=9)
    (_, _, tokens, valid), *_ = asked.groups
    whole = asked.job.evaluation
    one, two = (int(np.searchsorted(np.cumsum(w.scored.sum(axis=1)), 9)) + 1
                for w in whole.values())  # fmt: skip
    wanted = np.concatenate([whole["one"].tokens[:one], whole["two"].tokens[:two]])
    np.testing.assert_array_equal(tokens, wanted)
    assert valid.shape == tokens.shape and (one, two) == (2, 2)


def test_every_rule_and_seed_at_every_rate_is_a_task_with_a_budget_of_whole_experts(asked):
    seeds = RULES["random"].seeds
    assert len(set(seeds)) == len(seeds) > 1
    found = run(asked, rates=(0.25, 0.5, 0.51))
    # 64 channels: of 48 and 32; the last rate is the one before.
    rates = {0.25: 48, 0.5: 32}
    tasks = [(Task("uniform-act", rate, 0), kept) for rate, kept in rates.items()]
    tasks += [(Task("random", rate, seed), kept) for rate, kept in rates.items() for seed in seeds]
    assert sorted(asked.plans, key=str) == sorted(tasks, key=str)
    assert {(r.rule, r.rate, r.seed): r.kept for r in found.results} == {
        (task.rule, task.rate, task.seed): kept for task, kept in tasks
    }
    assert found.dense == {"one": QUALITY, "two": QUALITY}
    # 64 routed weights and 100 others, of 2 bytes.
    assert found.sizes == {"dense": 2 * 164, "experts": 2 * 64}
    with pytest.raises(InputError, match=r"prune_rate=1\.0"):
        run(asked, rates=(1.0,), overwrite=True)


@pytest.mark.parametrize(("fit", "size"), [(0.5, 1), (1.0, 1), (2.9, 2), (100.0, 16)])
def test_plans_share_a_reading_of_the_model_as_far_as_their_states_fit(asked, monkeypatch, fit,
                                                                       size):  # fmt: skip
    rows = sum(len(windows.tokens) for windows in asked.job.evaluation.values())
    monkeypatch.setattr(plan_groups, "STATE_BYTES", int(fit * rows * 8 * D * 4))
    steps = Told()
    rules = ("uniform-*",)
    run(asked, rules=rules, steps=steps, expert_details=True, gradients=True,
        weight_gradients=True, obs=True)  # fmt: skip
    total = sum(name.startswith("uniform-") for name in RULES)
    counts = [group[0] for group in asked.groups]
    assert counts == [size] * (total // size) + [total % size] * (total % size > 0)
    assert all(group[1] == 3 for group in asked.groups)
    done = [before * LAYERS + (layer + 1) * count
            for before, count in zip(np.cumsum([0, *counts]), counts, strict=False)
            for layer in range(LAYERS)]  # fmt: skip
    assert steps.bars[f"compare {total} plans"] == [(step, total * LAYERS) for step in done]


def test_without_a_rate_or_a_size_rules_are_compared_at_a_quarter_and_at_half(asked):
    assert {result.rate for result in run(asked, rates=()).results} == {0.25, 0.5}


def test_a_batch_is_never_wider_than_the_text(asked):
    asked.job.evaluation = {"one": words(5), "two": words(5)}
    run(asked)
    assert {group[1] for group in asked.groups} == {2}


def test_a_repair_measures_every_plan_a_second_time_and_alone(asked):
    steps = Told()
    found = run(asked, rules=("uniform-act",), repair="expert", steps=steps)
    assert asked.repaired == [(32, "expert")] and [group[0] for group in asked.groups] == [1]
    assert [(r.rule, r.repair) for r in found.results] == [
        ("uniform-act", ""), ("uniform-act", "expert")
    ]  # fmt: skip
    assert steps.bars["compare 2 plans"] == [(done, 6) for done in range(1, 7)]
    asked.job.calibration.tokens = np.zeros((2, 8))
    with pytest.raises(InputError, match=r"there are 2; give .* --window, or leave --repair away"):
        run(asked, repair="expert", overwrite=True)


def test_fewer_experts_are_rows_of_the_same_reading_with_what_their_tokens_went_to(asked):
    found = run(asked, rules=("uniform-act",), top_k=(1,))
    names = ["unpruned", "top-1", "uniform-act"]
    assert [r.name for r in found.results] == names and [g[0] for g in asked.groups] == [3]
    assert [(r.name, r.kept) for r in found.results if r.rate == 0] == [("unpruned", 64),
                                                                        ("top-1", 64)]  # fmt: skip
    tokens = int(asked.groups[0][3].sum())
    for task, shares in asked.shares.items():
        wanted = 6 / tokens / 8 if task.top_k else 0.5  # six of eight experts in two layers
        np.testing.assert_allclose(shares, np.full((2, 4), wanted), rtol=1e-12)
    with pytest.raises(InputError, match=r"top_k=2 must lie in \[1, 1\], because a token of this"):
        run(asked, top_k=(2,))


def test_rules_that_drop_experts_have_a_row_without_their_rows_of_the_router(asked):
    found = run(asked, (0.25,), ("uniform-act", "experts-usage"), cut_router=True)
    names = ["uniform-act", "experts-usage", "experts-usage+cut"]
    assert [r.name for r in found.results] == names and asked.cut == [[False, False, True]]
    # What is kept, 48 of 64 channels, are the four experts of one layer and two of the other.
    shares = {task.cut: one for task, one in asked.shares.items() if task.rule == "experts-usage"}
    np.testing.assert_array_equal(shares[False], np.full((2, 4), 0.5))
    np.testing.assert_array_equal(shares[True], [[0.5] * 4, [1.0, 1.0, 0.0, 0.0]])
    run(asked, (0.25,), ("experts-usage",), cut_router=True)
    assert len(asked.groups) == 1
    with pytest.raises(InputError, match="none of the --rules drops whole experts; name one"):
        run(asked, rules=("uniform-act", "mone"), cut_router=True, expert_details=True,
            overwrite=True)  # fmt: skip


def test_merged_experts_are_rows_of_their_own_readings_in_all_bits(asked, monkeypatch):
    merged, told = [], Told()

    def run_merges(job, statistics, tasks, budgets, texts, references, on_layer):
        assert job.base is asked.job.base and statistics == "statistics"
        assert texts.keys() == references.keys() == {"one", "two"}
        merged.append([(task, budgets[task]) for task in tasks])
        on_layer(LAYERS - 1)
        return [Result(**dataclasses.asdict(tasks[0]), kept=budgets[tasks[0]],
                       quality=dict.fromkeys(texts, QUALITY))], [
            Result(**dataclasses.asdict(task), reason="too few") for task in tasks[1:]
        ]  # fmt: skip

    monkeypatch.setattr(plan_groups, "run_merges", run_merges)
    found = run(asked, rules=("uniform-act",), merges=("m-smoe", "re*"), steps=told)
    assert merged == [[(Task("m-smoe", 0.5), 32), (Task("ream", 0.5), 32)]]
    assert [group[0] for group in asked.groups] == [1]
    assert [r.name for r in found.results] == ["uniform-act", "m-smoe"]
    assert told.bars["compare 3 plans"][-1] == (9, 9)
    assert told.lines == ["at 0.5: too few (refused: ream)"]
    run(asked, rules=("uniform-act",), merges=("m-smoe", "ream"))
    assert len(merged) == 1  # what is there or was refused is not planned again
    with pytest.raises(InputError, match="merge='reem' is unknown; did you mean 'ream'"):
        run(asked, merges=("reem",))
    asked.job.calibration.valid = asked.job.calibration.valid & False
    with pytest.raises(InputError, match="merging compares 4 experts"):
        run(asked, merges=("ream",), overwrite=True)


def test_a_rule_that_cannot_is_said_with_its_reason_and_the_others_go_on(asked):
    asked.refuse = {"uniform-act", "uniform-weight"}
    steps = Told()
    found = run(asked, rules=("uniform-act", "uniform-weight", "uniform-energy"), steps=steps)
    assert [r.rule for r in found.results] == ["uniform-energy"]
    assert [(r.rule, r.reason) for r in found.refused] == [
        ("uniform-act", "too small"), ("uniform-weight", "too small")
    ]  # fmt: skip
    assert steps.lines == ["at 0.5: too small (refused: uniform-act, uniform-weight)"]
    assert [group[0] for group in asked.groups] == [1]
    asked.refuse = set(RULES)
    asked.groups.clear()
    none = run(asked, rules=("uniform-fisher",), gradients=True)
    assert not none.results and not asked.groups


def test_what_is_there_is_not_measured_again_and_only_what_was_asked_for_is_shown(asked):
    run(asked, rules=("uniform-act",))
    found = run(asked, rates=(0.25,), rules=("uniform-act",))
    assert [task.rate for task, _ in asked.plans] == [0.5, 0.25]
    assert [r.rate for r in found.results] == [0.25]
    stored = json.loads((asked.job.output / "compare.json").read_text())
    assert [r["rate"] for r in stored["results"]] == [0.5, 0.25]
    again = run(asked, rates=(0.25, 0.5), rules=("uniform-act",))
    assert len(asked.plans) == 2 and len(again.results) == 2
    assert [(shown, folder) for shown, folder in asked.saved] == [
        (asked.saved[0][0], asked.job.output), (found, asked.job.output),
        (again, asked.job.output),
    ]  # fmt: skip
    # An interrupted one goes on whatever is said, a finished one is begun anew.
    run(asked, rules=("uniform-act",), overwrite=True)
    assert len(asked.plans) == 2
    (asked.job.output / comparing.comparison_page.PAGE).write_text("")
    run(asked, rules=("uniform-act",), overwrite=True)
    assert len(asked.plans) == 3


def test_results_are_those_of_their_key(asked):
    found = run(asked, seed=4)
    calibration = asked.job.calibration
    text = calibration.tokens.tobytes() + calibration.valid.tobytes()
    assert found.key == {
        "model_hash": "abc", "dtype": "float32", "block": 2, "group_size": None, "window": 8,
        "seed": 4,
        "calibration": sha256(text).hexdigest(), "loss_on": "answers",
        "evaluation": text_hashes(asked.job.evaluation),
    }  # fmt: skip
    with pytest.raises(InputError, match=r"compare\.json holds results of another seed; name"):
        run(asked, seed=5)
    assert run(asked, seed=5, overwrite=True).key["seed"] == 5


def test_all_rules_switch_on_what_they_need_and_without_a_text_nothing_is_begun(asked):
    steps = Told()
    run(asked, rules=("all",), steps=steps)
    (recipe,) = asked.opened
    assert recipe.gradients and recipe.expert_details and recipe.weight_gradients and recipe.obs
    assert [line for line in steps.lines if line.startswith("all rules need gradients, expert")]
    asked.job.evaluation = {}
    with pytest.raises(InputError, match="no text to evaluate on; name one with --evaluation"):
        run(asked, overwrite=True)
    with pytest.raises(InputError, match=re.escape("add --gradients")):
        run(asked, rules=("uniform-fisher",))


# --- one task ---


def test_a_plan_is_made_by_its_rule_seed_and_budget(monkeypatch):
    given = {}

    def make_plan(rule, statistics, **options):
        given.update(options, rule=rule, statistics=statistics)
        return "plan"

    monkeypatch.setattr(compared, "make_plan", make_plan)
    job: Any = SimpleNamespace(base=Base(), recipe=SimpleNamespace(block=2, seed=10))
    noted = {"model_hash": "abc", "tokens": 9, "more": 1}
    assert compared.task_plan(job, None, noted, Task("random", 0.5, 3), 32) == "plan"
    assert given == {
        "rule": RULES["random"], "statistics": None, "budget": 32, "block": 2,
        "experts_per_token": 2, "layer_indices": (0, 2), "seed": 13,
        "notes": {"model_hash": "abc", "tokens": 9},
    }  # fmt: skip


def test_a_cut_router_knows_as_many_experts_as_a_token_goes_to(monkeypatch):
    keep = np.zeros(SHAPE, bool)
    keep[0, :2], keep[1, 3] = True, True
    plan = PruningPlan(keep, (0, 2))
    monkeypatch.setattr(compared, "make_plan", lambda *given, **options: plan)
    job: Any = SimpleNamespace(base=Base(), recipe=SimpleNamespace(block=2, seed=10))
    given = (job, None, {"model_hash": "abc", "tokens": 9})
    assert compared.task_plan(*given, Task("experts-usage", 0.5), 32) is plan
    cut = Task("experts-usage", 0.5, cut=True)
    with pytest.raises(BudgetError, match="would know 1 in some layer, fewer than the 2 that a"):
        compared.task_plan(*given, cut, 32)
    keep[1, 0, 0] = True
    found = compared.task_plan(*given, cut, 32)
    assert found.cut_router and found.keep is plan.keep


def test_every_text_is_measured_on_its_own_rows(monkeypatch):
    texts = {"one": words(20), "two": words(30, 7)}
    tokens, valid = compared.joined(texts)
    assert len(tokens) == len(valid) == sum(len(w.tokens) for w in texts.values())
    states = np.arange(len(tokens))[:, None, None] * np.ones((1, 8, D))

    def quality_of(reference, windows, other):
        assert reference.head == "the head"
        rows = [int(row) for row in reference.hidden[:, 0, 0]]
        np.testing.assert_array_equal(tokens[rows], windows.tokens)
        return SimpleNamespace(to_dict=lambda: {"rows": rows, "of": other})

    monkeypatch.setattr(compared, "quality_of", quality_of)

    def sizes(job, plan, bits, shares):
        return {"bytes": (int(plan.keep.sum()), bits), "active": shares}

    monkeypatch.setattr(compared, "_sizes", sizes)
    keep = np.zeros(SHAPE, bool)
    keep[0, 1, :3] = keep[1, 2] = True
    job: Any = SimpleNamespace(base=Base())
    task = Task("random", 0.25, 2, "layer", 4, 900)
    found = compared.task_result(task, PruningPlan(keep, (0, 2)), job, states, texts,
                                 {"one": "a", "two": "b"}, "shares")  # fmt: skip
    first = len(texts["one"].tokens)
    assert found.quality == {"one": {"rows": [*range(first)], "of": "a"},
                             "two": {"rows": [*range(first, len(tokens))], "of": "b"}}  # fmt: skip
    assert (found.kept, found.emptied) == (11, 6)
    assert (found.rule, found.rate, found.seed, found.repair) == ("random", 0.25, 2, "layer")
    assert (found.bits, found.target, found.bytes, found.active) == (4, 900, (11, 4), "shares")
    assert (found.family, found.about) == (RULES["random"].family, RULES["random"].about)


def test_a_repaired_plan_is_run_from_a_folder_that_goes_afterwards(monkeypatch, tmp_path):
    tokens = np.arange(40).reshape(5, 8)
    text = SimpleNamespace(tokens=tokens, valid=tokens > 0, total=39, sources=SOURCES)
    recipe = SimpleNamespace(batch=3, window=8, dtype="float32", group_size=64)
    job: Any = SimpleNamespace(base=Base(), recipe=recipe, output=tmp_path, dtype=np.float32,
                               calibration=text)  # fmt: skip
    plan = PruningPlan(np.ones(SHAPE, bool), (0, 2), {"model_hash": "abc"})
    asked: dict[str, Any] = {}

    def repair_model(base, plan_, tokens_, valid, folder, **options):
        assert base is job.base and plan_ is plan and tokens_ is tokens and valid is text.valid
        asked.update(options)
        folder.mkdir()

    def forward_hidden(source, *given, **options):
        assert (tmp_path / compared.FOLDER).is_dir()
        return source, given, options

    monkeypatch.setattr(compared, "repair_model", repair_model)
    monkeypatch.setattr(compared, "forward_hidden", forward_hidden)
    monkeypatch.setattr(compared, "PrunedSource", lambda base, plan: "pruned")
    monkeypatch.setattr(compared, "with_repair", lambda source, plan, folder: (source, folder))
    layers: list[int] = []
    monkeypatch.setattr(compared, "QuantizedSource", lambda *given: given)
    given: Any = (job, plan, "layer", [16, 4], ("tokens", "valid"), layers.append)
    found: Any = compared.repaired_hidden(*given)
    folder = tmp_path / compared.FOLDER
    how = {"batch": 3, "dtype": np.float32}
    repaired = ("pruned", folder)
    assert found == [(source, ("tokens", "valid"), how)
                     for source in (repaired, (repaired, 64, "int4"))]  # fmt: skip
    assert not folder.exists()
    asked["on_layer"](1)
    assert layers == [1] and asked["mode"] == "layer"
    assert {name: asked[name] for name in how} == how
    assert asked["provenance"] == {**compared.of_plan(job, plan), "mode": "layer"}
