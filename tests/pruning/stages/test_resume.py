"""A killed run goes on where it stopped, and ends as if nothing had happened."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.checkpoint import open_checkpoint
from convert.layer_reader import LayerReader
from moe_jax.files import remove_leftovers
from pruning.budget.plan import PruningPlan
from pruning.stages import folder as output_folder
from tests.support.command import given, run

# Runs the command and sends itself a signal at the moment a file would take its final name, or
# while an export lies half written.
STOPPED = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for background jobs
moment, number, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
replace, fsync = os.replace, os.fsync

def stopping_replace(source, target):
    if Path(target).match(moment):
        os.kill(os.getpid(), number)
    replace(source, target)

def stopping_fsync(descriptor):
    if moment == "half export" and "/exports/" in os.readlink(f"/proc/self/fd/{descriptor}"):
        os.kill(os.getpid(), number)
    fsync(descriptor)

os.replace, os.fsync = stopping_replace, stopping_fsync
import tests.conftest
from pruning.cli import main
sys.exit(main(arguments))
"""
EXPORT = "ragged-bf16"


def stopped(moment: str, number: int, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", STOPPED, moment, str(int(number)), *map(str, arguments)],
        capture_output=True, text=True,
    )  # fmt: skip


def leftovers(out: Path) -> list[str]:
    return sorted(path.name for path in out.rglob("*") if ".tmp-" in path.name)


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_one_that_was_not(models, texts, tmp_path):
    def arguments(out: Path) -> tuple:
        words = ("compress", models / "single", *given(texts, out), "--bits", 16)
        return ("--quiet", *words, "--repair", "none")

    calm, out = tmp_path / "calm", tmp_path / "out"
    assert run(*arguments(calm)) == 0

    def stop(moment: str, number: int, code: int) -> str:
        done = stopped(moment, number, *arguments(out))
        assert done.returncode == code, done.stderr
        return done.stderr

    statistics = out / "statistics.safetensors"
    # killed between the two files of the statistics: the half pair does not count
    stop("statistics.json", signal.SIGKILL, -signal.SIGKILL)
    assert statistics.exists() and leftovers(out)
    first = statistics.stat().st_mtime_ns
    # interrupted by hand once they are whole
    shown = stop("plan.safetensors", signal.SIGINT, 130)
    assert "interrupted; the same command goes on from here" in shown
    assert not leftovers(out) and not (out / "plan.json").exists()
    scored = statistics.stat().st_mtime_ns
    assert scored != first
    # killed inside an export, and again before the report
    stop("half export", signal.SIGKILL, -signal.SIGKILL)
    assert leftovers(out / "exports") and not (out / "exports" / EXPORT).exists()
    stop("report.json", signal.SIGKILL, -signal.SIGKILL)
    exported = (out / "exports" / EXPORT).stat().st_ino
    assert leftovers(out) and not leftovers(out / "exports")

    assert run(*arguments(out)) == 0
    assert statistics.stat().st_mtime_ns == scored
    assert (out / "exports" / EXPORT).stat().st_ino == exported

    def contents(folder: Path) -> dict[str, bytes]:
        varying = ("recipe.yaml", "report.json", "report.html")  # hold paths and seconds
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {str(f.relative_to(folder)): b"" if f.name in varying else f.read_bytes()
                for f in files}  # fmt: skip

    assert contents(out) == contents(calm)
    ours, theirs = (json.loads((f / "report.json").read_text()) for f in (out, calm))
    for key in ("plan", "counts", "sizes", "verification", "sample", "expert_coverage"):
        assert ours[key] == theirs[key], key


def test_a_run_is_not_taken_up_with_other_options(models, texts, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ("score", models / "single", *given(texts, out))
    assert run(*arguments) == 0
    written = (out / "statistics.safetensors").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert (out / "statistics.safetensors").stat().st_mtime_ns == written
    capsys.readouterr()
    assert run(*arguments, "--seed", 1) == 2
    assert "is not an interrupted run of this recipe" in capsys.readouterr().err


def test_overwriting_scores_again_what_is_finished_and_goes_on_with_what_is_not(
    models, texts, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    statistics = out / "statistics.safetensors"
    arguments = ("--quiet", "score", models / "single", *given(texts, out))
    assert run(*arguments) == 0
    first, content = statistics.stat().st_mtime_ns, statistics.read_bytes()
    killed = stopped("statistics.json", signal.SIGKILL, *arguments, "--overwrite")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert statistics.stat().st_mtime_ns != first and not (out / "statistics.json").exists()
    with monkeypatch.context() as patch:
        patch.delattr(LayerReader, "layer")  # all are through
        assert run(*arguments, "--overwrite") == 0
    assert statistics.read_bytes() == content and (out / "statistics.json").exists()
    assert not [*out.glob("scoring*")]


def test_what_a_sweep_left_beside_finished_statistics_goes(models, texts, tmp_path):
    out, calm = tmp_path / "out", tmp_path / "calm"
    arguments = ("--quiet", "score", models / "single", *given(texts, out))
    assert run(*arguments) == 0
    out.rename(calm)
    killed = stopped("statistics.json", signal.SIGKILL, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shutil.copy(calm / "statistics.json", out)  # as if killed just after
    assert [*(out / "scoring").iterdir()]
    written = (out / "statistics.safetensors").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert {path.name for path in out.iterdir()} == {path.name for path in calm.iterdir()}
    assert (out / "statistics.safetensors").stat().st_mtime_ns == written


def test_statistics_of_a_changed_model_are_measured_again(models, texts, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(models / "single", model)
    assert run("score", model, *given(texts, out)) == 0
    written = (out / "statistics.safetensors").read_bytes()
    shutil.copy(models / "other" / "model.safetensors", model)
    assert run("score", model, *given(texts, out)) == 0
    assert (out / "statistics.safetensors").read_bytes() != written
    found = json.loads((out / "statistics.json").read_text())
    assert found["model_hash"] == open_checkpoint(models / "other").fingerprint


def test_exports_of_another_plan_are_not_taken_for_this_ones(scored, tmp_path):
    out = shutil.copytree(scored, tmp_path / "out")
    export = out / "exports" / "ragged-bf16"
    plan = PruningPlan.load(out)
    output_folder.drop_stale_exports(out, plan)
    assert export.is_dir()
    other = np.roll(plan.keep, 1, axis=2)
    output_folder.drop_stale_exports(out, PruningPlan(other, plan.layer_indices, plan.provenance))
    assert not export.exists()


def test_a_plan_half_written_makes_its_exports_stale(scored, tmp_path):
    out = shutil.copytree(scored, tmp_path / "out")
    plan = PruningPlan.load(out)
    (out / "plan.json").write_text("{")
    output_folder.drop_stale_exports(out, plan)
    assert not (out / "exports").exists()


def test_what_killed_writers_left_is_cleaned_up_and_nothing_else(tmp_path):
    random = "0123456789abcdef"
    names = (f"a.tmp-{random}", f"b.old-{random}", f"c.old-{random}", "c", "notes.tmp-old")
    for name in (*names, "d.tmp-12", f"d.tmp-{random}0"):
        (tmp_path / name).mkdir()
    (tmp_path / f"e.json.tmp-{random}").write_text("half")
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    # b was set aside and its successor never came: it is the only copy
    kept = {"b", "c", "notes.tmp-old", "d.tmp-12", f"d.tmp-{random}0"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_what_a_card_that_was_written_again_left_goes_too(tmp_path):
    half = "README.md.tmp-0123456789abcdef"
    places = [tmp_path / place / "exports" / EXPORT for place in (".", "plans/0.5")]
    for place in places:
        place.mkdir(parents=True)
        (place / half).write_text("half")
        (place / "README.md").write_text("whole")
    (tmp_path / "exports" / "mine").mkdir()
    (tmp_path / "exports" / "mine" / half).write_text("of somebody else")
    output_folder.clear_leftovers(tmp_path)
    for place in places:
        assert [path.name for path in place.iterdir()] == ["README.md"]
    assert (tmp_path / "exports" / "mine" / half).exists()
