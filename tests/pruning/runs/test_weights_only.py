"""Without calibration text the weights alone plan, export and report, and the report says so."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from pruning.budget.planners import PLANNERS
from pruning.demo import demo_texts
from pruning.scores.statistics import load_statistics
from tests.pruning.scores.test_noise import worth_by_hand
from tests.support.command import given, refused, run

FLAGS = ("--weights-only", "--bits", 16)


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """What a run without any text leaves, and what it printed is checked where it ran."""
    out = tmp_path_factory.mktemp("weights") / "out"
    assert run("--quiet", "compress", models / "single", *FLAGS, "--output", out) == 0
    return out


@pytest.fixture(scope="module")
def weighed(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("weighed") / "out"
    assert run("--quiet", "score", models / "single", *FLAGS, "--output", out) == 0
    return out


def check_kept(folder, worth) -> None:
    """A plan of 25 % keeps in every expert the channels of largest `worth(layer, expert)`."""
    keep = load_file(folder / "plan.safetensors")
    removed = 0
    for layer in range(2):
        for expert, mask in enumerate(keep[f"keep.{layer}"]):
            own = worth(layer, expert)
            removed += (~mask).sum()
            if mask.any() and not mask.all():
                # sums are float32
                assert own[mask].min() >= own[~mask].max() - 1e-5 * own.max()
    assert removed == 0.25 * 2 * 8 * 64


def test_the_channels_kept_are_those_that_add_most_to_the_output_on_noise(models, finished):
    worth = [worth_by_hand(models / "single", i, 8, rounded=bfloat16) for i in range(2)]
    check_kept(finished, lambda layer, expert: worth[layer][expert])


def test_the_channels_kept_by_weight_are_those_with_the_largest_weights(models, weighed, tmp_path):
    stored = load_file(models / "single" / "model.safetensors")
    out = shutil.copytree(weighed, tmp_path / "out")
    assert run("--quiet", "plan", out, "--criterion", "weight") == 0

    def worth(layer, expert):
        prefix = f"model.layers.{layer}.mlp.experts.{expert}."
        gate, up, down = (
            stored[f"{prefix}{name}_proj.weight"].astype(bfloat16).astype(np.float64)
            for name in ("gate", "up", "down")
        )
        return np.sqrt((gate**2).sum(1)) + np.sqrt((up**2).sum(1)) + np.sqrt((down**2).sum(0))

    check_kept(out, worth)


def test_the_run_exports_verifies_and_says_that_no_text_was_read(finished):
    report = json.loads((finished / "report.json").read_text())
    assert report["calibration"] == {"tokens": 0, "sources": [], "stability": None}
    assert report["recipe"]["weights_only"] is True and report["quality"] == {}
    assert (report["recipe"]["criterion"], report["recipe"]["attribution"]) == ("noise", "aimer")
    assert {"logits in JAX", "logits in transformers"} <= {
        check["check"] for check in report["verification"] if check["ok"]
    }
    assert all(check["ok"] and check["done"] for check in report["verification"])
    assert (finished / "exports" / "ragged-bf16" / "model.safetensors").is_file()
    page = (finished / "report.html").read_text()
    assert "No calibration text was read" in page
    assert report["not_run"] == {"random": "no text was named to measure on",
                                 "samples": "there was no text to continue"}  # fmt: skip
    assert all(reason in page for reason in report["not_run"].values())
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["weights_only"] is True
    statistics, notes = load_statistics(finished / "statistics.safetensors")
    assert not statistics.hidden_square.any() and statistics.down_norm.all()
    assert notes["tokens"] == 0 and not [*finished.glob("scoring*")]


def test_the_terminal_says_that_no_text_was_read(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("compress", models / "single", *FLAGS, "--output", out)
    assert run(*arguments, "--evaluation", texts / "good.txt") == 0
    shown = capsys.readouterr()
    said = "no text is read: the weights alone decide (criterion noise, attribution aimer)"
    assert said in re.sub(r"\s+", " ", shown.err)
    assert "no text scored" in shown.out
    # a text to measure on is none to plan by: quality and a sample are there
    assert "prompt: " in shown.out
    assert json.loads((out / "report.json").read_text())["quality"]["good"]["pruned"]["nll"] > 0


def test_without_any_text_no_sample_is_printed(finished, capsys):
    assert run("report", finished) == 0
    shown = capsys.readouterr().out
    assert "no text scored" in shown and "prompt" not in shown


@pytest.mark.parametrize("command", ["score", "compress"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--criterion", "act"],
            r"criterion='act' needs calibration text, .* noise, random, weight, or",
        ),
        (["--attribution", "ala"], r"attribution='ala' needs .* among aimer, uniform, weight, or"),
        (["--calibration", "good.txt"], r"which calibration=\('good\.txt',\) needs; leave out one"),
        (["--gradients"], r"which gradients=True needs"),
        (["--until-stable", 0.9], r"which until_stable=0\.9 needs"),
        (["--criterion", "wieght"], r"did you mean 'weight'"),
    ],
)
def test_what_needs_text_is_refused_before_any_work(
    models, tmp_path, capsys, command, flags, message
):
    arguments = (command, models / "single", *FLAGS, "--output", tmp_path / "out", *flags)
    assert re.search(message, shown := refused(capsys, tmp_path, *arguments)), shown


def test_a_recipe_with_a_text_is_refused_as_its_flag_is(models, tmp_path, capsys):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"model": str(models / "single"), "output": "o",
                                      "calibration": ["a.txt"]}))  # fmt: skip
    shown = refused(capsys, tmp_path, "score", "--recipe", recipe, "--weights-only")
    assert "weights_only reads no calibration text" in shown


def test_the_scored_folder_is_gone_on_with_and_replaced_only_on_request(
    models, weighed, tmp_path, capsys
):
    out = shutil.copytree(weighed, tmp_path / "out")
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(weighed), str(out)))
    written = (out / "statistics.safetensors").stat().st_mtime_ns
    arguments = (models / "single", *FLAGS, "--output", out)
    assert run("--quiet", "score", *arguments) == 0
    assert (out / "statistics.safetensors").stat().st_mtime_ns == written
    assert "add --overwrite" in refused(capsys, out, "score", *arguments, "--seed", 1)
    assert run("--quiet", "score", *arguments, "--seed", 1, "--overwrite") == 0
    assert (out / "statistics.safetensors").stat().st_mtime_ns != written


@pytest.mark.parametrize("planner", PLANNERS)
def test_every_planner_keeps_the_budget_without_text(weighed, tmp_path, planner):
    out = shutil.copytree(weighed, tmp_path / "out")
    assert run("--quiet", "plan", out, "--planner", planner, "--prune-rate", 0.5) == 0
    keep = load_file(out / "plan.safetensors")
    assert sum(mask.sum() for mask in keep.values()) == 512


def test_the_folder_serves_a_sweep_and_refuses_what_needs_text(weighed, texts, tmp_path, capsys):
    out = shutil.copytree(weighed, tmp_path / "out")
    rates = ("--prune-rate", 0.25, 0.5, "--text", texts / "good.txt")
    assert run("--quiet", "eval", out, *rates) == 0
    assert "share of noise" in (out / "sweep.html").read_text()
    shown = refused(capsys, out, "plan", out, "--criterion", "act")
    assert "use noise, random, weight with aimer, uniform, weight" in shown
    shown = refused(capsys, out, "audit", out)
    assert "was scored without text (weights_only)" in shown


def test_statistics_of_before_serve_the_other_criteria_and_are_scored_anew_for_noise(
    models, weighed, tmp_path, capsys
):
    out = shutil.copytree(weighed, tmp_path / "out")
    recipe, path = out / "recipe.yaml", out / "statistics.safetensors"
    recipe.write_text(recipe.read_text().replace(str(weighed), str(out)))
    sums = load_file(path)
    noise = sums.pop("noise")
    save_file(sums, path)
    shown = refused(capsys, out, "plan", out)
    assert "'noise' was not collected" in shown and "score the model again with --weights" in shown
    assert run("--quiet", "plan", out, "--criterion", "weight") == 0
    assert run("--quiet", "score", models / "single", *FLAGS, "--output", out) == 0
    np.testing.assert_array_equal(load_file(path)["noise"], noise)


def test_noise_is_refused_with_a_text_before_any_work(models, texts, scored, tmp_path, capsys):
    arguments = (models / "single", *given(texts, tmp_path / "out"), "--criterion", "noise")
    for command in ("score", "compress"):
        shown = refused(capsys, tmp_path, command, *arguments, "--bits", 16)
        assert "'noise' was not collected" in shown and "again with --weights-only" in shown
    assert "again with --weights-only" in refused(
        capsys, scored, "plan", scored, "--criterion", "noise"
    )


@pytest.mark.slow
def test_on_held_out_text_noise_costs_less_than_chance_and_norms_cost_more(tmp_path):
    """The demo at 25 %, one width for all experts."""
    text, out, found = tmp_path / "held-out.txt", tmp_path / "out", tmp_path / "sweep.json"
    text.write_text("\n".join(Path(name).read_text()[:1000] for name in demo_texts("evaluation")))
    flags = ("--weights-only", "--bits", 16, "--width", "uniform", "--output", out)
    assert run("--quiet", "score", "demo", *flags) == 0
    recipe, costs = yaml.safe_load((out / "recipe.yaml").read_text()), {}
    for criterion, seed in (("noise", 0), ("weight", 0), ("random", 0), ("random", 1)):
        changed = recipe | {"criterion": criterion, "seed": seed}
        (out / "recipe.yaml").write_text(yaml.safe_dump(changed))
        rate = ("--prune-rate", 0.25, "--text", text, "--json", found)
        assert run("--quiet", "eval", out, *rate) == 0
        rows = json.loads(found.read_text())["texts"]
        dense, pruned = (next(iter(rows[name].values()))["nll"] for name in rows)
        costs.setdefault(criterion, []).append(pruned - dense)
    assert 0 < costs["noise"][0] < 0.9 * min(costs["random"]), costs
    assert costs["weight"][0] > max(costs["random"]), costs
