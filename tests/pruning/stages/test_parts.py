"""Calibration in parts: resumed, equal to one sweep, and stopped when the plan is stable."""

import json
import signal

import numpy as np
from safetensors.numpy import load_file

from pruning.recipe.recipe import CompressionRecipe
from pruning.scores.collect import collect_statistics
from pruning.scores.own import STATISTICS, Statistic
from pruning.scores.statistics import load_statistics
from pruning.stages.job import open_job
from tests.pruning.stages.test_resume import stopped
from tests.support.command import given, run


def test_a_killed_sweep_resumes_at_the_next_part_and_ends_the_same(models, texts, tmp_path):
    def arguments(out):
        return ("--quiet", "score", models / "single", *given(texts, out))

    calm, out = tmp_path / "calm", tmp_path / "out"
    assert run(*arguments(calm)) == 0
    killed = stopped("parts/001.safetensors", signal.SIGKILL, *arguments(out))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in (out / "parts").glob("*.json")] == ["000.json"]
    first = (out / "parts" / "000.safetensors").stat().st_mtime_ns
    assert run(*arguments(out)) == 0
    assert (out / "parts" / "000.safetensors").stat().st_mtime_ns == first
    ours, theirs = (load_file(f / "statistics.safetensors") for f in (out, calm))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    assert len(list((out / "parts").glob("*.safetensors"))) >= 4


def test_parts_add_up_to_one_sweep_and_say_how_stable_the_plan_is(models, texts, tmp_path):
    out = tmp_path / "out"
    flags = ("--expert-details", "--prune-rate", 0.5)
    assert run("--quiet", "score", models / "single", *given(texts, out), *flags) == 0
    found, notes = load_statistics(out / "statistics.safetensors")
    job = open_job(
        CompressionRecipe(model=str(models / "single"), output=str(tmp_path / "other"),
                          calibration=(str(texts / "good.txt"),), batch=4, planner="fair")
    )  # fmt: skip
    whole = collect_statistics(
        job.base, job.calibration.tokens, job.calibration.valid, expert_details=True, batch=4
    )
    for name in ("hidden_square", "phi", "tokens", "output_gram", "wanda_up"):
        # float32 sums inside a batch, other batches
        np.testing.assert_allclose(
            getattr(found, name), getattr(whole, name), rtol=1e-4, atol=1e-5, err_msg=name
        )
    stability = notes["stability"]
    assert stability["tokens"][-1] == job.calibration.total
    assert stability["jaccard"][0] is None and len(stability["jaccard"]) >= 4
    assert all(0 < value <= 1 for value in stability["jaccard"][1:])
    assert 0 < stability["halves"] < 1


def test_a_part_of_few_windows_is_not_padded_to_a_whole_batch(models, texts, tmp_path, monkeypatch):
    work = {}
    for batch in (2, 8):

        def seen(rows, batch=batch):
            work[batch] = rows.weight.shape[0]
            return rows.weight

        monkeypatch.setitem(STATISTICS, "seen", Statistic(seen, axes="LE"))
        out = tmp_path / str(batch)
        flags = ("--max-tokens", 6 * 64, "--quiet", "--batch", batch)
        assert run("score", models / "single", *given(texts, out), *flags) == 0
    assert work[8] == work[2]  # four parts of one or two windows


def test_scoring_stops_once_the_kept_set_is_stable(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("score", models / "single", *given(texts, out), "--until-stable", 0.05)
    assert run(*arguments) == 0
    notes = json.loads((out / "statistics.json").read_text())
    assert len(notes["stability"]["tokens"]) == 2
    assert notes["stability"]["tokens"][-1] < notes["tokens"]
    assert "kept set changed by" in capsys.readouterr().err
    written = (out / "statistics.safetensors").stat().st_mtime_ns
    assert run(*arguments) == 0  # found again although it used less than the whole text
    assert (out / "statistics.safetensors").stat().st_mtime_ns == written


def test_gradient_sums_of_parts_add_up_to_those_of_one_sweep(models, texts, tmp_path):
    out = tmp_path / "out"
    assert run("--quiet", "score", models / "single", *given(texts, out), "--gradients") == 0
    found, _ = load_statistics(out / "statistics.safetensors")
    assert len(list((out / "parts").glob("*.safetensors"))) >= 4
    job = open_job(
        CompressionRecipe(model=str(models / "single"), output=str(tmp_path / "other"),
                          calibration=(str(texts / "good.txt"),), batch=4, planner="fair")
    )  # fmt: skip
    text = job.calibration.tokens, job.calibration.valid
    whole = collect_statistics(job.base, *text, gradients=True, batch=4)
    assert whole.groups == found.groups == {"gradients"}
    for name, wanted in whole.arrays().items():
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(
            found.arrays()[name], wanted, rtol=1e-4, atol=1e-5 * scale, err_msg=name
        )


def test_parts_of_a_text_that_has_changed_since_are_scored_again(models, texts, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((texts / "good.txt").read_text())

    def score(out):
        arguments = ("--output", out, "--calibration", text, "--batch", 4)
        assert run("--quiet", "score", models / "single", *arguments) == 0
        return load_file(out / "statistics.safetensors")

    old = score(tmp_path / "out")
    for name in ("statistics.json", "statistics.safetensors"):  # killed after the last part
        (tmp_path / "out" / name).unlink()
    text.write_text(text.read_text().replace("quick", "quiet"))  # as many tokens
    found, wanted = score(tmp_path / "out"), score(tmp_path / "fresh")
    assert np.abs(old["hidden_square"] - wanted["hidden_square"]).max() > 1e-3
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    text.write_text(text.read_text().replace("quiet", "quick"))  # with statistics there
    again = score(tmp_path / "out")
    for name, value in old.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
