"""What is shown where: tables or JSON on stdout, the rest on stderr; exit codes of errors."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from pruning.cli import commands
from pruning.cli.main import main
from pruning.report.compression import CompressionReport
from tests.support.command import given, run


@pytest.fixture
def out(scored, tmp_path):
    return shutil.copytree(scored, tmp_path / "out")


def asked(name: str, out, models, texts) -> tuple:
    return {
        "inspect": ("inspect", models / "single"),
        "estimate": ("estimate", models / "single", "--no-probe", "--bits", 16),
        "plan": ("plan", out, "--prune-rate", 0.25, 0.5),
        "export": ("export", out, "--overwrite"),
        "verify": ("verify", out),
        "eval": ("eval", out, "--prune-rate", 0.25, 0.5, "--text", texts / "good.txt"),
        "score": ("score", models / "single", *given(texts, out.parent / "fresh")),
    }[name]


COMMANDS = ("inspect", "estimate", "plan", "export", "verify", "eval", "score")
PAGES = {
    "plan": lambda out: out / "sweep.html",
    "eval": lambda out: out / "sweep.html",
    "score": lambda out: out.parent / "fresh" / "statistics.safetensors",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_tables_for_people_or_nothing_but_json(out, models, texts, tmp_path, capsys, name):
    arguments = asked(name, out, models, texts)
    file = tmp_path / "found.json"
    assert run(*arguments, "--json", file) == 0
    people = capsys.readouterr().out
    with pytest.raises(json.JSONDecodeError):
        json.loads(people)
    if name in PAGES:
        assert people.splitlines()[-1] == str(PAGES[name](out))
    assert run(*arguments, "--json", "-") == 0
    shown = capsys.readouterr().out
    free = re.compile(r'"free_bytes": \d+')  # of the disk, on which others write too
    assert free.sub("", shown) == free.sub("", file.read_text())
    json.loads(shown)


def test_a_long_name_is_whole_in_a_pipe_and_in_a_narrow_one(out, texts, tmp_path):
    text = tmp_path / f"{'long' * 30}.txt"
    shutil.copy(texts / "good.txt", text)
    arguments = ["eval", out / "exports/ragged-bf16", "--text", text, "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "pruning", *map(str, arguments)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "40"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    (line,) = [line for line in done.stdout.splitlines() if str(text) in line]
    assert len(line) > len(str(text)) + 20  # its numbers stand beside it


def test_a_reader_that_has_seen_enough_is_no_error(out, models):
    command = f"{sys.executable} -m pruning inspect {models / 'single'} --json -"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""


def test_progress_is_on_stderr_and_quiet_is_quiet(out, capsys):
    assert run("verify", out, "--json", "-") == 0
    loud = capsys.readouterr()
    assert "verify ragged-bf16" in loud.err and "MB of memory" not in loud.err
    assert run("verify", out, "--verbose") == 0
    assert re.search(r"verify ragged-bf16: \S+ s, at most \S+ MB", capsys.readouterr().err)
    assert run("verify", out, "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_a_place_for_json_is_asked_for_before_any_work(out, tmp_path, capsys):
    absent = tmp_path / "absent" / "found.json"
    assert run("plan", out, "--prune-rate", 0.25, "--json", absent) == 2
    assert "lies in no existing folder; make it first" in capsys.readouterr().err


def test_a_fault_of_the_program_has_a_traceback_and_a_code_of_its_own(models, capsys, monkeypatch):
    def fault(options):
        raise ValueError("Incompatible shapes for broadcasting")

    monkeypatch.setattr(commands, "inspect", fault)
    assert main(["inspect", str(models / "single")]) == 70
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "Incompatible shapes" in shown
    last = shown.splitlines()[-1]
    assert re.search(r"fault of the program.*report it.*Python 3\.\d+.*jax 0\.\d+", last)


def test_debug_shows_where_bad_input_was_found(tmp_path, capsys):
    for flags, traced in (([], False), (["--debug"], True)):
        assert run("inspect", tmp_path, *flags) == 2
        shown = capsys.readouterr().err
        assert ("Traceback" in shown) == traced
        assert "config.json is missing" in shown.splitlines()[-1]


def test_a_finished_run_repeated_shows_its_report(models, texts, tmp_path, capsys, monkeypatch):
    out, text = tmp_path / "out", tmp_path / "evaluation.txt"
    text.write_text("The lazy dog sleeps. " * 20)
    arguments = ("compress", models / "single", *given(texts, out), "--bits", 16)
    arguments += ("--evaluation", text)
    assert run(*arguments) == 0
    first, written = capsys.readouterr(), (out / "report.json").read_bytes()
    assert first.out.splitlines()[-1] == str(out / "report.html")
    assert run(*arguments) == 0
    again = capsys.readouterr()
    assert again.out == first.out and (out / "report.json").read_bytes() == written
    assert f"{out}/report.html; --overwrite runs it again" in again.err.replace("\n", "")
    assert run(*arguments, "--quiet", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(written)
    # A check that failed then is no success now.
    report = CompressionReport.load(out / "report.json")
    report.verification[0]["ok"] = False
    report.save(out)
    assert run(*arguments) == 1
    assert "verification failed" in capsys.readouterr().err
    # Another text under the same name, another recipe, or an export that is gone: the folder is in
    # the way, as ever.
    text.write_text("The quick fox jumps. " * 20)
    assert run(*arguments) == 2
    text.write_text("The lazy dog sleeps. " * 20)
    assert run(*arguments) == 1
    assert run(*arguments, "--prune-rate", 0.5) == 2
    shutil.rmtree(out / "exports")
    assert run(*arguments) == 2
    assert "add --overwrite" in capsys.readouterr().err


def test_numbers_into_a_folder_are_refused_before_any_work(tmp_path, capsys):
    assert run("inspect", tmp_path / "absent", "--json", tmp_path) == 2
    assert f"json={tmp_path} is a folder; name a file in it" in capsys.readouterr().err
