"""Output folders, disks and files of earlier stages: nothing old is lost, nothing half is left."""

import collections
import errno
import math
import os
import re
import resource
import shutil
from pathlib import Path

import jax
import pytest

from pruning.recipe.recipe import CompressionRecipe
from pruning.runs import export as exporting
from pruning.stages.folder import make_output
from tests.support.command import given, poison, refused, run


@pytest.fixture
def finished(scored, tmp_path) -> Path:
    """A copy that looks finished, with a file of the user's own."""
    out = shutil.copytree(scored, tmp_path / "finished")
    (out / "report.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    return out


@pytest.mark.parametrize("command", ["compress", "score"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_that_no_run_made_is_never_touched(
    models, texts, tmp_path, capsys, command, overwrite
):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    arguments = (models / "single", *given(texts, home), *overwrite)
    shown = refused(capsys, tmp_path, command, *arguments)
    assert re.search(r"home already exists .*no recipe\.yaml.*name another folder", shown), shown


@pytest.mark.parametrize("command", ["compress", "score"])
def test_a_finished_folder_is_refused_unless_it_may_be_overwritten(
    models, texts, finished, tmp_path, capsys, command
):
    shown = refused(capsys, tmp_path, command, models / "single", *given(texts, finished))
    assert re.search(r"already exists .*; name another folder or add --overwrite", shown), shown


def test_an_output_that_is_a_file_is_refused(models, texts, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    arguments = (models / "single", *given(texts, tmp_path / "out"), "--overwrite")
    assert "out is a file; name a folder" in refused(capsys, tmp_path, "compress", *arguments)


def test_an_output_that_holds_the_model_is_refused(models, texts, tmp_path, capsys):
    folder = shutil.copytree(models / "single", tmp_path / "out" / "model")
    (tmp_path / "out" / "recipe.yaml").write_text("model: m\noutput: o\n")
    for out in (tmp_path / "out", folder):
        arguments = (folder, *given(texts, out), "--overwrite")
        shown = refused(capsys, tmp_path, "compress", *arguments)
        assert re.search(r"holds .*model, which is read; name another folder", shown), shown


@pytest.mark.parametrize(
    "arguments", [["--calibration", "absent.txt"], ["--prune-rate", "0.99"], ["--block", "48"]]
)
def test_overwriting_leaves_the_old_result_until_the_new_input_is_sound(
    models, texts, finished, tmp_path, capsys, arguments
):
    given_ = (*given(texts, finished), "--overwrite", *arguments)
    refused(capsys, tmp_path, "compress", models / "single", *given_)


def test_overwriting_leaves_the_old_result_until_the_new_weights_are_sound(
    models, texts, finished, tmp_path, capsys
):
    folder = shutil.copytree(models / "single", tmp_path / "model")
    poison(folder)
    refused(capsys, tmp_path, "score", folder, *given(texts, finished), "--overwrite")


def test_overwriting_replaces_a_runs_files_and_keeps_those_of_the_user(models, texts, finished):
    old = (finished / "statistics.safetensors").stat().st_mtime_ns
    assert run("score", models / "other", *given(texts, finished), "--overwrite") == 0
    names = {path.name for path in finished.iterdir()}
    ours = {"recipe.yaml", "model.json", "statistics.safetensors", "statistics.json"}
    assert names == ours | {"notes.txt"}
    assert (finished / "statistics.safetensors").stat().st_mtime_ns != old


MINE = (
    "plan.docx", "compare.xlsx", "audit.md", "sweep.py", "statistics.txt", "scoring/notes.txt",
    "scoring/1.txt", "exports/thesis/a.txt", "exports/notes.txt", "plans/ideas.txt",
    "plans/0.5/a.md", "plans/old/plan.json", "gptq/layer-cake.safetensors", "gptq/paper.pdf",
)  # fmt: skip


def test_overwriting_deletes_what_a_run_writes_and_nothing_else(models, texts, scored, tmp_path):
    out = shutil.copytree(scored, tmp_path / "out")
    assert run("plan", out, "--prune-rate", 0.25, 0.5) == 0
    ours = {path for path in out.rglob("*") if path.is_file()}
    for name in (
        "compare.json", "audit.html", "ablations.jsonl", "gptq/layer-00000.safetensors",
        "scoring/step-00000.safetensors", "scoring/progress.json",
    ):  # fmt: skip
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("old")
        ours.add(out / name)
    for name in MINE:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    assert run("score", models / "other", *given(texts, out), "--overwrite") == 0
    assert {str(path.relative_to(out)) for path in ours if path.exists()} == {
        "recipe.yaml", "model.json", "statistics.safetensors", "statistics.json",
    }  # fmt: skip
    assert {(out / name).read_text() for name in MINE} == {"mine"}
    for name in MINE:
        (out / name).unlink()
    again = run("score", models / "single", *given(texts, out), "--overwrite")
    assert again == 0 and {p.name for p in out.iterdir()} >= {"statistics.json"}
    assert not (out / "scoring").exists()


def set_free(monkeypatch, size: float) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, int(size)))


@pytest.mark.parametrize("command", ["compress", "score"])
def test_a_full_disk_is_noticed_before_any_work(
    models, texts, tmp_path, capsys, monkeypatch, command
):
    set_free(monkeypatch, 5e6)
    out = tmp_path / "deep" / "out"
    shown = refused(capsys, tmp_path, command, models / "single", *given(texts, out))
    pattern = (
        rf"{re.escape(str(out))} has 5000\.0 kB free but up to (\d+\.\d) MB are needed "
        r"\(statistics \d.*\); free some space or choose another disk"
    )
    found = re.search(pattern, shown)
    assert found and 64 < float(found[1]) < 70, shown
    assert ("ragged-int4" in shown) == (command == "compress")


def test_a_full_disk_is_noticed_before_an_export(scored, tmp_path, capsys, monkeypatch):
    out = shutil.copytree(scored, tmp_path / "out")
    set_free(monkeypatch, 5e6)
    shown = refused(capsys, tmp_path, "export", out, "--export", "padded-bf16", "ragged-int4")
    assert re.search(r"5000\.0 kB free but up to .*padded-bf16 .*ragged-int4", shown), shown


@pytest.fixture
def limit_files():
    """Sets the largest size of a file, which stands in for a disk that fills up while writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    # Compiled programs would be cut too, and stay in the cache of all tests.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def test_a_disk_that_fills_up_during_an_export_leaves_nothing_half_written(
    scored, tmp_path, capsys, limit_files
):
    out = shutil.copytree(scored, tmp_path / "out")
    limit_files(50_000)
    shown = refused(capsys, tmp_path, "export", out, "--export", "padded-bf16")
    assert re.search(r"File too large.*; free some space, then the same command goes on", shown)


def test_a_disk_that_fills_up_before_an_export_leaves_nothing_to_go_on_from(
    scored, tmp_path, capsys, monkeypatch
):
    out = shutil.copytree(scored, tmp_path / "out")

    def full(*_):
        assert (out / "exports" / ".begun.json").exists()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out / "repair" / "states"))

    monkeypatch.setattr(exporting.repair_stage, "repair", full)
    assert run("export", out, "--export", "padded-bf16", "--repair", "layer") == 2
    assert "No space left" in capsys.readouterr().err
    assert not (out / "exports" / ".begun.json").exists()


def test_a_disk_that_fills_up_after_scoring_leaves_no_half_statistics(
    models, texts, tmp_path, capsys, limit_files
):
    out = tmp_path / "out"
    limit_files(20_000)  # room for the hidden states of few and short windows
    options = ("--window", 16, "--max-tokens", 64)
    assert run("score", models / "single", *given(texts, out), *options) == 2
    assert "scoring/step-00000.safetensors cannot be written" in capsys.readouterr().err
    names = {path.name for path in out.rglob("*") if path.is_file()}
    (states,) = (path.name for path in out.glob("scoring-*.states"))
    assert names == {"recipe.yaml", "progress.json", states}


def test_statistics_of_another_model_are_refused(scored, models, texts, tmp_path, capsys):
    out = shutil.copytree(scored, tmp_path / "out")
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("/single", "/other"))
    for arguments in (
        ["plan", out],
        ["eval", out, "--prune-rate", 0.5, "--text", texts / "good.txt"],
    ):
        shown = refused(capsys, tmp_path, *arguments)
        message = r"statistics\.safetensors was measured on model \w{64}, but .*other is \w{64}; sc"
        assert re.search(message, shown), shown


@pytest.mark.parametrize("command", ["export", "verify"])
def test_a_plan_of_another_model_is_refused(scored, tmp_path, capsys, command):
    out = shutil.copytree(scored, tmp_path / "out")
    recipe = out / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("/single", "/other"))
    extra = ["--export", "padded-bf16"] if command == "export" else []
    shown = refused(capsys, tmp_path, command, out, *extra)
    assert re.search(r"the plan was made for model \w{64}, this model is \w{64}; score", shown)


def test_an_export_that_is_there_is_refused_before_the_others_are_written(scored, tmp_path, capsys):
    out = shutil.copytree(scored, tmp_path / "out")
    shown = refused(capsys, tmp_path, "export", out, "--export", "padded-bf16", "ragged-bf16")
    assert "exports/ragged-bf16 already exist; add --overwrite to replace them" in shown


def test_a_plan_that_does_not_fit_the_groups_is_refused_before_the_export(scored, tmp_path, capsys):
    out = shutil.copytree(scored, tmp_path / "out")
    assert run("plan", out, "--block", 1, "--minimum", 1, "--prune-rate", 0.3) == 0
    shown = refused(capsys, tmp_path, "export", out, "--export", "padded-bf16", "ragged-int4")
    assert re.search(r"group_size=32 does not divide width \d+; export 16 bits", shown), shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], r"recipe\.yaml does not exist; run `moe-compress score` first"),
        (["export"], r"recipe\.yaml does not exist; run `moe-compress score` first"),
        (["verify"], r"recipe\.yaml does not exist; run `moe-compress score` first"),
        (["report"], r"report\.json does not exist; run `moe-compress compress` first"),
    ],
)
def test_a_stage_names_the_stage_that_must_come_first(tmp_path, capsys, arguments, message):
    shown = refused(capsys, tmp_path, *arguments, tmp_path)
    assert re.search(message, shown), shown


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("statistics.safetensors", ["plan"], r"statistics\.safetensors is damaged .*remove it and"),
        ("statistics.json", ["plan"], r"statistics\.safetensors is damaged .*remove it and score"),
        ("plan.safetensors", ["export"], r"holds no readable plan"),
        ("plan.json", ["verify"], r"holds no readable plan"),
        ("recipe.yaml", ["plan"], r"recipe\.yaml: option='mod' is unknown; did you mean 'model'"),
    ],
)
def test_a_damaged_file_of_an_earlier_stage_is_named(
    scored, tmp_path, capsys, name, arguments, message
):
    out = shutil.copytree(scored, tmp_path / "out")
    (out / name).write_text("mod: 1" if name == "recipe.yaml" else "{")
    shown = refused(capsys, tmp_path, *arguments, out)
    assert re.search(message, shown), shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prune-rate", "0.5", "1"], r"prune_rate=1\.0 must lie in \[0, 1\)"),
        (["--window", "1"], r"window=1 must be at least 2; change --window"),
        (["--stride", "64"], r"stride=64 must lie in \[1, window=64\)"),
        (["--batch", "0"], r"batch=0 must be at least 1; change --batch"),
        (["--json", "absent/q.json"], r"json=absent/q\.json lies in no existing folder; make it"),
        (["--text", "absent.txt"], r"absent\.txt does not exist; check the path"),
    ],
)
def test_bad_evaluation_options_are_refused(models, scored, texts, capsys, arguments, message):
    folder = scored if "--prune-rate" in arguments else models / "single"
    shown = refused(capsys, scored, "eval", folder, "--text", texts / "good.txt", *arguments)
    assert re.search(message, shown), shown


def test_what_bits_of_layers_left_goes_with_the_run_and_what_others_put_there_stays(tmp_path):
    for name in ("bit-curves.json", "auto/one-5/plan.json", "auto/one-5/plan.safetensors",
                 "auto/two-6/plan.json", "auto/two-6/mine.txt",
                 "merged/ream-0.5/plan.json", "compare-tasks.csv"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    make_output(CompressionRecipe(model="demo", output=str(tmp_path)), resumed=False)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"recipe.yaml", "auto", "auto/two-6", "auto/two-6/mine.txt"}
