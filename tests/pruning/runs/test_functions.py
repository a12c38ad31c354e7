"""What the command line calls, called from Python: the same values come back."""

import json
import shutil

import numpy as np
import pytest

import pruning
from pruning.kit.progress import Steps
from tests.support.command import run

QUIET = Steps(quiet=True)


@pytest.fixture
def out(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "out")


def printed(capsys, *arguments):
    """The JSON of a command."""
    capsys.readouterr()
    assert run("--quiet", *arguments, "--json", "-") == 0
    return json.loads(capsys.readouterr().out)


def test_scores_are_those_of_the_folder(models, texts, scored, tmp_path):
    recipe = pruning.CompressionRecipe(
        model=str(models / "single"), output=tmp_path / "out", batch=4, bits=16,
        calibration=[str(texts / "good.txt")], planner="fair",
    )  # fmt: skip
    found = pruning.score(recipe, QUIET)
    stored, _ = pruning.load_statistics(scored / "statistics.safetensors")
    assert found.groups == stored.groups
    np.testing.assert_array_equal(found.energy, stored.energy)


def test_plans_exports_and_checks_of_a_folder(out, capsys):
    plans = pruning.plan_folder(out, [0.25, 0.5], criterion="act")
    assert [folder.name for folder, _ in plans] == ["0.25", "0.5"]
    assert all(plan.provenance["criterion"] == "act" for _, plan in plans)
    said = printed(capsys, "plan", out, "--prune-rate", 0.25, 0.5, "--criterion", "act")
    assert [one["kept"] for one in said] == [int(plan.counts.sum()) for _, plan in plans]
    folder = plans[1][0]
    (export,) = pruning.export_folder(folder, export=["padded-bf16"], steps=QUIET)
    assert export == folder / "exports" / "padded-bf16" and (export / "config.json").is_file()
    checks = pruning.verify(folder, QUIET)
    assert checks and all(check.ok for check in checks)
    assert [vars(check) for check in checks] == printed(capsys, "verify", folder)


def test_a_rate_and_a_target_exclude_each_other(out):
    with pytest.raises(pruning.InputError, match="target_bytes and prune rates exclude"):
        pruning.plan_folder(out, [0.5], target_bytes="1MB")


def test_the_likelihood_of_texts(out, texts, capsys):
    text = texts / "good.txt"
    found = pruning.evaluate(out, [text], [0.5], evaluation_tokens=100, steps=QUIET)
    assert set(found["texts"]) == {"dense", "prune-rate 0.5"}
    said = printed(capsys, "eval", out, "--text", text, "--prune-rate", 0.5,
                   "--evaluation-tokens", 100)  # fmt: skip
    assert found == said and found["texts"]["dense"][str(text)]["tokens"] == 99
    with pytest.raises(pruning.InputError, match="no text to evaluate on; name one with --text"):
        pruning.evaluate(out, [])


def test_an_estimate_needs_no_output(models, capsys):
    recipe = pruning.CompressionRecipe(model=str(models / "single"), output="out", bits=16)
    (found,) = pruning.estimate(recipe, [0.5], probe=False)
    (said,) = printed(capsys, "estimate", models / "single", "--bits", 16, "--no-probe",
                      "--prune-rate", 0.5)  # fmt: skip
    assert found["exports"] == said["exports"] and found["parameters"] == said["parameters"]
    with pytest.raises(pruning.InputError, match="tensor_parallel=0 must be at least 1"):
        pruning.estimate(recipe, tensor_parallel=0)


def test_an_audit_of_a_scored_folder(out, tmp_path):
    found = pruning.audit(
        out, experts=2, channels=2, tokens=64, output=tmp_path / "audit", steps=QUIET
    )
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == found
    assert not (out / "audit.json").exists()


def test_the_face_imports_no_jax_until_a_name_is_used():
    import subprocess
    import sys

    script = (
        "import pruning, sys; dir(pruning); pruning.InputError; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_activations_in_bfloat16_are_measured_as_such(out, texts, capsys):
    exact = pruning.evaluate(out / "exports" / "ragged-bf16", [texts / "good.txt"], steps=QUIET)
    text = ("--text", texts / "good.txt", "--dtype", "bfloat16")
    rounded = printed(capsys, "eval", out / "exports" / "ragged-bf16", *text)
    (one,), (two,) = exact["texts"].values(), rounded["texts"].values()
    assert one["nll"] != two["nll"] and one["nll"] == pytest.approx(two["nll"], rel=0.02)
