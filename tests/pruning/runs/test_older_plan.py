"""A new plan in a folder with exports and a report: what is older says so."""

import shutil

import numpy as np
import pytest
import yaml

from pruning.budget.plan import PruningPlan
from pruning.stages import folder as output_folder
from pruning.stages.made_by import MADE_BY
from tests.support.command import given, refused, run

OLDER = "this export was made by an older plan; run `moe-compress export` again"
EXPORT = "exports/ragged-bf16"


@pytest.fixture
def out(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "out")


def test_an_export_says_by_which_plan_of_which_model_it_was_made(out):
    told, plan = yaml.safe_load((out / EXPORT / MADE_BY).read_text()), PruningPlan.load(out)
    assert (told["plan"], told["model"]) == (plan.content_hash, plan.provenance["model_hash"])


def test_verify_and_eval_name_an_export_of_an_older_plan(out, texts, tmp_path, capsys):
    text = ("--text", texts / "good.txt")
    assert run("verify", out) == 0 and run("eval", out / EXPORT, *text) == 0
    assert "older" not in capsys.readouterr().err
    assert run("--quiet", "plan", out, "--prune-rate", 0.25) == 0
    shown = refused(capsys, tmp_path, "verify", out)
    assert f"{EXPORT}: {OLDER}" in shown and "Do not use" not in shown
    for arguments in ((out / EXPORT,), (out, "--prune-rate", 0.5)):
        assert run("eval", *arguments, *text) == 0
        assert f"{EXPORT}: {OLDER}" in " ".join(capsys.readouterr().err.split())
    assert run("--quiet", "export", out, "--export", "ragged-bf16", "--overwrite") == 0
    assert run("verify", out) == 0
    assert "older" not in capsys.readouterr().err


def test_the_same_plan_again_makes_nothing_old(out, capsys):
    assert run("--quiet", "plan", out, "--prune-rate", 0.25) == 0
    assert run("--quiet", "plan", out, "--prune-rate", 0.5) == 0
    assert run("verify", out) == 0
    assert "older" not in capsys.readouterr().err


def test_exports_of_a_plan_in_between_are_not_taken_up(out):
    """Plan, another plan with its export, the first plan: an interrupted run drops the export."""
    plan = PruningPlan.load(out)
    assert run("--quiet", "plan", out, "--prune-rate", 0.25) == 0
    assert run("--quiet", "export", out, "--export", "ragged-bf16", "--overwrite") == 0
    plan.save(out)
    output_folder.drop_stale_exports(out, plan)
    assert not (out / EXPORT).exists()


def test_an_export_that_says_nothing_is_judged_by_its_content(out, capsys):
    for content in (None, "[", "[1]", "plan: 3"):
        (out / EXPORT / MADE_BY).unlink(missing_ok=True)
        if content is not None:
            (out / EXPORT / MADE_BY).write_text(content)
        assert run("--quiet", "verify", out) == 0
    plan = PruningPlan.load(out)
    PruningPlan(np.roll(plan.keep, 1, axis=2), plan.layer_indices, plan.provenance).save(out)
    assert run("--quiet", "verify", out) != 0


@pytest.mark.slow
def test_a_report_of_an_older_plan_is_marked_and_unmarked(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--quiet", "compress", models / "single", *given(texts, out), "--bits", 16) == 0
    page, words = out / "report.html", "this report is of an older plan"
    stored, first = (out / "report.json").read_bytes(), page.read_text()
    assert words not in first
    capsys.readouterr()
    assert run("plan", out, "--prune-rate", 0.5) == 0
    assert words in page.read_text()
    assert run("report", out) == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert words in shown and f"{EXPORT}: {OLDER}" in shown and words in page.read_text()
    assert run("--quiet", "plan", out) == 0  # the run's own plan
    assert page.read_text() == first and (out / "report.json").read_bytes() == stored
