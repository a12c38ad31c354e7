"""A plan as a value and as two files: what it says of itself, and what is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moe_jax.errors import InputError
from pruning.budget.decide import plan_pruning
from pruning.budget.plan import PruningPlan
from pruning.budget.problem import Allocation
from pruning.budget.record import expert_record, outlier_record, recorded_options
from pruning.recipe.options import PlanOptions
from tests.support.synthetic import statistics

L, E, F, D = 2, 3, 5, 4


def plan_of(constants: bool = False, **provenance) -> PruningPlan:
    keep = np.random.default_rng(0).random((L, E, F)) < 0.5
    keep[0, 1] = keep[1, 0] = keep[1, 2] = False
    keep[0, 0] = True
    vectors = (np.full((1, D), 2.0, np.float32), np.arange(2 * D, dtype=np.float32).reshape(2, D))
    return PruningPlan(keep, (1, 4), provenance, vectors if constants else None)


@pytest.mark.parametrize(
    ("keep", "indices", "message"),
    [
        (np.ones((2, 3, 4)), (0, 1), r"keep is float64\[2, 3, 4\], expected bool \[L, E, F\]"),
        (np.ones((2, 3), bool), (0, 1), r"keep is bool\[2, 3\]"),
        (np.ones((2, 0, 4), bool), (0, 1), r"at least one layer, expert and channel"),
        (np.ones((2, 3, 4), bool), (0,), r"layer_indices=\(0,\) must be 2 different"),
        (np.ones((2, 3, 4), bool), (1, 0), "in ascending order"),
        (np.ones((2, 3, 4), bool), (1, 1), "different model layers"),
        (np.ones((2, 3, 4), bool), (-1, 1), "ascending"),
    ],
)
def test_what_is_no_plan_is_refused(keep, indices, message):
    assert PruningPlan(np.ones((2, 3, 4), bool), (0, 1)).constants is None
    with pytest.raises(InputError, match=message):
        PruningPlan(keep, indices)


@pytest.mark.parametrize(
    "shapes", [[(1, D)], [(1, D), (1, D)], [(1, D), (2, D + 1)], [(2, D), (1, D)]]
)
def test_constants_are_one_row_for_each_expert_without_channels(shapes):
    plan = plan_of()
    with pytest.raises(InputError, match=r"one row of one width for each of the \[1, 2\] experts"):
        PruningPlan(plan.keep, (1, 4), {}, tuple(np.zeros(s, np.float32) for s in shapes))
    assert plan.added(0) is None
    first, second = (plan_of(constants=True).added(slot) for slot in (0, 1))
    np.testing.assert_array_equal(first, [[0] * D, [2] * D, [0] * D])
    np.testing.assert_array_equal(second, [[0, 1, 2, 3], [0] * D, [4, 5, 6, 7]])
    assert first.dtype == second.dtype == np.float32


def test_statistics_alone_cannot_measure_rules():
    auto = PlanOptions(prune_rate=0.5, planner="auto")
    with pytest.raises(InputError, match="planner='auto' runs the model on a text, which"):
        plan_pruning(statistics(L, E, F), auto, experts_per_token=1)
    plan = plan_pruning(statistics(L, E, F), PlanOptions(prune_rate=0.5), experts_per_token=1)
    assert plan.provenance["planner"] == "fair"


def test_coverages_are_shares_of_scores_or_of_channels_where_there_is_no_score():
    plan = plan_of()
    channel = np.random.default_rng(1).random((L, E, F))
    channel[0, 2] = 0.0
    experts, layers = plan.expert_coverage(channel), plan.layer_coverage(channel)
    for layer in range(L):
        kept = total = 0.0
        for expert in range(E):
            pairs = list(zip(channel[layer, expert], plan.keep[layer, expert], strict=True))
            own, whole = sum(s for s, k in pairs if k), sum(s for s, _ in pairs)
            share = own / whole if whole else sum(k for _, k in pairs) / F
            assert experts[layer, expert] == pytest.approx(share, rel=1e-12)
            kept, total = kept + own, total + whole
        assert layers[layer] == pytest.approx(kept / total, rel=1e-12)
    assert plan.counts.tolist() == [[sum(row) for row in rows] for rows in plan.keep.tolist()]
    nothing = plan.layer_coverage(np.zeros((L, E, F)))
    np.testing.assert_allclose(nothing, plan.keep.mean(axis=(1, 2)))


@pytest.mark.parametrize("constants", [False, True])
@pytest.mark.parametrize("name", ["", "own.json", "own.safetensors", "v1.5"])
def test_a_plan_is_read_as_it_was_written(tmp_path, constants, name):
    numbers = {"a": np.float32(0.5), "b": np.arange(3), "path": Path("x/y"), "rate": 0.25}
    plan, place = plan_of(constants, **numbers), tmp_path / "new" / name
    plan.save(place)
    folder, stem = (place.parent, "own") if name.startswith("own") else (place, "plan")
    files = [folder / f"{stem}{end}" for end in (".json", ".safetensors")]
    assert all(file.is_file() for file in files)
    for path in (place, *files):
        found = PruningPlan.load(path)
        np.testing.assert_array_equal(found.keep, plan.keep)
        assert found.layer_indices == (1, 4)
        assert found.provenance == {"a": 0.5, "b": [0, 1, 2], "path": "x/y", "rate": 0.25}
        assert found.content_hash == plan.content_hash
        assert (found.constants is None) == (not constants)
    assert hashlib.sha256(files[1].read_bytes()).hexdigest() == plan.content_hash
    said = json.loads(files[0].read_text())
    assert files[0].read_text().endswith("}\n")
    assert (said["format_version"], said["d_expert"], said["layer_indices"]) == (1, F, [1, 4])
    assert said["counts"] == plan.counts.tolist()
    # What it does and what it says are both part of being the same.
    one = plan_of(constants, rate=0.25)
    assert one.is_same(plan_of(constants, rate=0.25))
    assert not one.is_same(plan_of(constants, rate=0.5))
    assert not one.is_same(plan_of(not constants, rate=0.25))


def test_bits_of_layers_are_a_part_of_what_a_plan_does(tmp_path):
    plain = plan_of(True)
    plan = dataclasses.replace(plain, layer_bits=(16, 4, 16, 16, 8))
    other = dataclasses.replace(plan, layer_bits=(16, 4, 16, 16, 4))
    assert len({one.content_hash for one in (plan, plain, other)}) == 3
    plan.save(tmp_path)
    found = PruningPlan.load(tmp_path)
    assert found.layer_bits == plan.layer_bits and found.content_hash == plan.content_hash
    for bits in ((4, 4, 4, 4), (4, 4, 4, 4, 5)):  # the last layer of the plan is the fifth
        with pytest.raises(
            InputError, match=r"layer_bits=\(4, 4, 4, 4.* for each layer of the mod"
        ):
            dataclasses.replace(plain, layer_bits=bits)
    named = load_file(tmp_path / "plan.safetensors")
    save_file(named | {"layer_bits": np.array([4.5])}, tmp_path / "plan.safetensors")
    with pytest.raises(InputError, match="layer_bits"):
        PruningPlan.load(tmp_path)


def rewritten(folder: Path, change) -> Path:
    path = folder / "plan.json"
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))
    return folder


def retold(folder: Path, change) -> Path:
    path = folder / "plan.safetensors"
    named = load_file(path)
    change(named)
    save_file(named, path)
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: rewritten(f, lambda s: s.update(format_version=2)), "has format 2, expected 1"),
        (
            lambda f: rewritten(f, lambda s: s.update(format_version="9" * 200)),
            "has format 9{80}, expected 1",
        ),
        (lambda f: rewritten(f, lambda s: s["counts"][0].reverse()), "are of different plans"),
        (lambda f: rewritten(f, lambda s: s.pop("counts")), "no readable plan .*counts"),
        (lambda f: rewritten(f, lambda s: s.update(layer_indices=["1", "4"])), "something else"),
        (lambda f: rewritten(f, lambda s: s.update(provenance=[])), "something else"),
        (lambda f: rewritten(f, lambda s: s.update(layer_indices=[1, 5])), "expected .*keep.5"),
        (lambda f: retold(f, lambda n: n.update(more=np.ones(1))), "holds .*'more'"),
        (lambda f: retold(f, lambda n: n.pop("keep.4")), "of one shape"),
        (lambda f: retold(f, lambda n: n.pop("constant.4")), "of one shape"),
        (lambda f: retold(f, lambda n: n.update({"keep.4": n["keep.4"][:2]})), "of one shape"),
        (lambda f: (f / "plan.safetensors").write_bytes(b"x") and f, "no readable plan"),
        (lambda f: (f / "plan.json").write_text("[]") and f, "no readable plan"),
    ],
)
def test_damaged_files_and_files_of_two_plans_are_refused(tmp_path, damage, message):
    plan_of(constants=True).save(tmp_path)
    with pytest.raises(InputError, match=message):
        PruningPlan.load(damage(tmp_path) or tmp_path)


@pytest.mark.parametrize("gone", ["plan.json", "plan.safetensors"])
def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path, gone):
    plan_of().save(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(FileNotFoundError, match=f"{gone} is missing; make it with `moe-compress"):
        PruningPlan.load(tmp_path)


def test_a_plan_is_for_one_model_until_it_is_moved():
    plan = plan_of(model_hash="a", rate=0.5)
    plan.require_model("a")
    plan_of().require_model("a")
    with pytest.raises(InputError, match="made for model a, this model is b; score this model"):
        plan.require_model("b")
    assert plan.moved_to("a") is plan
    free = plan_of()
    assert free.moved_to("a") is free
    moved = plan.moved_to("b")
    assert moved.provenance == {"planned_for": "a", "model_hash": "b", "rate": 0.5}
    assert moved.content_hash == plan.content_hash
    assert moved.moved_to("c").provenance["planned_for"] == "a"


def test_what_is_remarkable_of_experts_is_recorded_with_their_layers():
    sums = statistics(L, E, F, D=D)
    sums = sums.replace(tokens=np.array([[31.0, 32.0, 0.0], [100.0, 33.0, 31.9]]),
                        total_tokens=np.array(64.0))  # fmt: skip
    counts = np.array([[0, 3, 0], [1, 0, 5]])
    found = expert_record(sums, np.array([[0.0, -1.0, 2.0], [-0.1, 3.0, -2.0]]),
                          Allocation(counts, counts), (1, 4))  # fmt: skip
    assert found == {
        "emptied_experts": 3, "harmful_experts": 3, "starved_share": 0.5,
        "starved_experts": [[1, 0], [1, 2], [4, 2]],
    }  # fmt: skip
    unseen = sums.replace(tokens=0 * sums.tokens, total_tokens=np.array(0.0))
    found = expert_record(unseen, np.zeros((L, E)), Allocation(counts, counts), (1, 4))
    assert found["starved_experts"] == [] and found["harmful_experts"] == 0
    outliers = np.zeros((L, E, F), bool)
    outliers[0, 2, 1] = outliers[1, 1, 3] = outliers[1, 1, 4] = True
    keep = np.ones((L, E, F), bool)
    keep[1, 1, 3] = keep[0, 0] = False
    assert outlier_record(outliers, keep, (1, 4)) == {
        "super_channels": [[1, 2, 1], [4, 1, 3], [4, 1, 4]], "super_channels_removed": 1,
    }  # fmt: skip


def test_options_of_a_plan_are_those_of_its_record_without_what_the_model_decides():
    said = {"criterion": "act", "cap": None, "block": 8, "minimum": 8, "prune_rate": 0.5,
            "planner_options": {"rho_max": 0.75, "unknown": 1}, "layer_rates": {"3": 0.25, "5": 0},
            "width": "free", "budget": 77}  # fmt: skip
    assert recorded_options(said) == {
        "criterion": "act", "width": "free", "rho_max": 0.75, "layer_rate": ["3=0.25", "5=0"],
    }  # fmt: skip
    assert recorded_options({}) == {"layer_rate": []}


TEXT = {"text": "a.txt", "sha256": "ab", "weight": 1.0, "documents": 1, "tokens": 9}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("planner_options", [1]), ("layer_rates", [1]), ("scoring", 3), ("choice", "best"),
        ("evaluation", {"a": 1}), ("block", "32"), ("prune_rate", None), ("criterion", ["act"]),
        ("sources", TEXT), ("sources", [1]), ("sources", [TEXT | {"tokens": "9"}]),
        *[("sources", [{n: v for n, v in TEXT.items() if n != gone}]) for gone in TEXT],
    ],
)  # fmt: skip
def test_a_plan_that_says_something_else_of_itself_is_refused(tmp_path, name, value):
    plan_of(sources=[TEXT, TEXT], unknown=[1], planner=None).save(tmp_path)
    told = json.loads((tmp_path / "plan.json").read_text())
    assert PruningPlan.load(tmp_path).provenance == told["provenance"]
    told["provenance"][name] = value
    (tmp_path / "plan.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=f"{name} in its provenance hold something.*plan again"):
        PruningPlan.load(tmp_path)
