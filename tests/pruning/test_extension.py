"""What pruning/README.md shows of one's own scores, rules and families, run as it stands there."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import convert
import pruning
from convert import open_checkpoint
from pruning import CompressionRecipe, Steps, compress, load_statistics
from pruning.budget.plan import PruningPlan
from pruning.budget.rules import check_needs
from pruning.runs.compare import compare
from pruning.scores.statistics import field_shapes
from tests.support import command, plans, synthetic

README = Path(pruning.__file__).parent / "README.md"
REGISTRIES = (pruning.STATISTICS, pruning.CHANNEL_CRITERIA, pruning.EXPERT_CRITERIA,
              pruning.PLANNERS, pruning.RULES, convert.FAMILIES)  # fmt: skip


@pytest.fixture(scope="module")
def shown():
    """The section's blocks by what they register; all but the last have been run."""
    before = [dict(registry) for registry in REGISTRIES]
    text = README.read_text(encoding="utf-8")
    section = text[text.index("## Your own") :]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names: dict = {}
    for block in blocks[:-1]:
        exec(block, names)
    yield blocks
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.fixture(scope="module")
def model(models, tmp_path_factory) -> Path:
    """The tiny model under the name of the registered family."""
    folder = shutil.copytree(models / "single", tmp_path_factory.mktemp("own") / "model")
    command.change_config(folder, model_type="my_moe")
    return folder


def recipe(model, texts, output, **options) -> CompressionRecipe:
    return CompressionRecipe(
        model=str(model), output=str(output), calibration=(str(texts / "good.txt"),),
        evaluation=(str(texts / "good.txt"),), batch=4, block=8, prune_rate=0.5,
        **{"planner": "fair", "repair": "none", **options},
    )  # fmt: skip


@pytest.fixture(scope="module")
def compressed(shown, model, texts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "out"
    own = {"criterion": "mean-abs", "attribution": "mean-abs", "planner": "rooted"}
    compress(recipe(model, texts, out, bits=16, **own), Steps(quiet=True))
    return out


def test_every_extension_takes_ten_lines_at_most(shown):
    assert len(shown) == 6
    assert all(len(block.strip().splitlines()) <= 10 for block in shown)
    assert pruning.RULES["mine"].needs == frozenset()
    check_needs(["mine"], frozenset())


def test_a_statistic_of_ones_own_is_summed_over_the_tokens_of_each_expert(compressed):
    statistics, _ = load_statistics(compressed / "statistics.safetensors")
    found = statistics["hidden_abs"]
    assert found.shape == statistics.shape and found.dtype == np.float64
    # Sums of |h| lie between the root of the sum of squares and that times the root of the count.
    low = np.sqrt(statistics.hidden_square)
    high = low * np.sqrt(statistics.tokens)[:, :, None]
    assert (found >= low * (1 - 1e-4)).all() and (found <= high * (1 + 1e-4)).all()
    assert (found > low * 1.5).any()


def test_the_plan_follows_the_registered_names(compressed):
    plan = PruningPlan.load(compressed)
    statistics, _ = load_statistics(compressed / "statistics.safetensors")
    said = plan.provenance
    assert (said["criterion"], said["attribution"], said["planner"]) == (
        "mean-abs", "mean-abs", "rooted",
    )  # fmt: skip
    for place in np.ndindex(*plan.counts.shape):
        value, kept = statistics["hidden_abs"][place], plan.keep[place]
        assert value[kept].min(initial=np.inf) >= value[~kept].max(initial=0.0)
    (export,) = (compressed / "exports").iterdir()
    config = json.loads((export / "config.json").read_text())
    assert config["model_type"].endswith("my_moe")
    assert open_checkpoint(export).about.family.model_type == config["model_type"]


def test_the_command_line_accepts_registered_names(compressed, tmp_path):
    out = shutil.copytree(compressed, tmp_path / "out")
    flags = ("--criterion", "mean-abs", "--planner", "rooted", "--prune-rate", 0.25)
    assert command.run("--quiet", "plan", out, *flags) == 0
    assert PruningPlan.load(out).provenance["prune_rate"] == 0.25


def test_a_planner_of_ones_own_and_the_same_importance_by_name_plan_alike(shown, monkeypatch):
    monkeypatch.setitem(pruning.IMPORTANCE, "rooted", lambda scores, options: scores.expert**0.5)
    given = {"criterion": "energy", "prune_rate": 0.5, "experts_per_token": 1}
    stats = synthetic.statistics(2, 4, 12)
    own = plans.plan_of(stats, planner="rooted", **given)
    named = plans.plan_of(stats, planner="fair", weights="rooted", **given)
    np.testing.assert_array_equal(own.keep, named.keep)
    assert (own.keep != plans.plan_of(stats, planner="fair", **given).keep).any()


def test_a_rule_of_ones_own_is_compared(shown, model, texts, tmp_path):
    found = compare(
        recipe(model, texts, tmp_path / "out", evaluation_tokens=60), [0.5], ["mine", "random"],
        steps=Steps(quiet=True),
    )  # fmt: skip
    assert {result.rule for result in found.results} == {"mine", "random"} and not found.refused
    assert "mean |h|, rooted" in (tmp_path / "out" / "compare.html").read_text()


def test_a_mask_of_ones_own_becomes_a_model(shown, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "model")
    exec(shown[-1], {})
    (export,) = (tmp_path / "out" / "exports").iterdir()
    assert open_checkpoint(export).about.widths == ((48,) * 8,) * 2


def test_earlier_statistics_without_a_registered_sum_are_collected_again(shown):
    statistics = synthetic.statistics(2, 3, 4)
    assert statistics.covers(())
    statistics = statistics.replace(extra={})
    assert not statistics.covers(())
    with pytest.raises(ValueError, match=r"'hidden_abs' was not collected.*pruning\.STATISTICS"):
        plans.plan_of(statistics, criterion="mean-abs", prune_rate=0.5, experts_per_token=1)
    with pytest.raises(ValueError, match="did you mean 'hidden_abs'"):
        statistics["hidden_aps"]


def test_a_statistic_of_another_shape_than_its_axes_is_refused(shown, model, texts, tmp_path):
    wrong = pruning.Statistic(lambda rows: rows.hidden.sum(axis=1), axes="LEF")
    with pytest.raises(ValueError, match="axes='L' of a statistic must be"):
        pruning.Statistic(lambda rows: rows.weight, axes="L")
    pruning.STATISTICS["wrong"] = wrong
    try:
        with pytest.raises(ValueError, match=r"statistic 'wrong' returns .* for axes 'LEF'"):
            compress(recipe(model, texts, tmp_path / "out", bits=16), Steps(quiet=True))
        pruning.STATISTICS["wrong"] = dataclasses.replace(wrong, axes="LE")
        base = open_checkpoint(model)
        tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
        found = pruning.collect_statistics(base, tokens, np.ones((2, 12), bool), batch=2)
    finally:
        del pruning.STATISTICS["wrong"]
    assert found["wrong"].shape == found.shape[:2]
    assert found.merge(found)["wrong"].sum() == 2 * found["wrong"].sum()


def test_a_statistic_under_one_of_our_names_is_refused(monkeypatch):
    ours = synthetic.statistics(2, 3, 4)
    monkeypatch.setitem(pruning.STATISTICS, "phi", pruning.Statistic(lambda rows: rows.hidden))
    with pytest.raises(pruning.InputError, match=r"names \['phi'\], which are ours"):
        field_shapes(2, 3, 4)
    shadowed = ours.replace(extra={"phi": np.zeros((2, 3))})
    np.testing.assert_array_equal(shadowed["phi"], ours.phi)
