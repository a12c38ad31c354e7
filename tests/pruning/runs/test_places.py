"""Commands on several processes of one machine, beside one process; and where they refuse."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from moe_jax.errors import InputError, LostProcess
from moe_jax.spread import Spread
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs import places
from pruning.scores.statistics import load_statistics
from tests.support.command import given, refused, run
from tests.support.processes import run_in_all

README = Path(__file__).parents[3] / "moe_jax" / "README.md"


@pytest.mark.slow
def test_two_processes_compress_as_one_also_after_one_of_them_was_killed(
    models, texts, scored, tmp_path
):
    out = tmp_path / "out"
    compress = ("compress", models / "single", *given(texts, out), "--prune-rate", 0.5,
                "--export", "ragged-bf16", "--repair", "none", "--json", "-")  # fmt: skip
    # Process 1 dies with its states of the second layer not told to process 0.
    first, second = run_in_all(["", "scoring-*-1.states"], "--quiet", *compress)
    assert second.returncode == -signal.SIGKILL, second.stderr
    # Some versions of jax see it sooner, and end the process with words of their own.
    assert first.returncode in (os.EX_TEMPFAIL, -signal.SIGABRT), first.stderr
    if first.returncode == os.EX_TEMPFAIL:
        assert "another process has ended" in first.stderr
        assert "the same command, given to all processes again, goes on" in first.stderr
    assert not (out / "statistics.safetensors").exists()
    (mine,) = out.glob("scoring-????????????????.states")
    (theirs,) = out.glob("scoring-*-1.states")
    assert mine.stat().st_size == theirs.stat().st_size
    first, second = run_in_all(["", ""], *compress)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "2 processes share the text" in first.stderr and second.stdout == ""
    assert all(check["ok"] for check in json.loads(first.stdout)["verification"])
    names = {"recipe.yaml", "model.json", "statistics.json", "statistics.safetensors", "plan.json",
             "plan.safetensors", "exports", "report.json", "report.html"}  # fmt: skip
    assert {path.name for path in out.iterdir()} == names
    ours, theirs = (load_statistics(f / "statistics.safetensors") for f in (out, scored))
    # How stable the kept set was depends on the rate that is asked for.
    assert {**ours[1], "stability": None} == {**theirs[1], "stability": None}
    for name, value in theirs[0].arrays().items():
        np.testing.assert_allclose(ours[0].arrays()[name], value, rtol=1e-6, err_msg=name)
    assert (out / "plan.safetensors").read_bytes() == (scored / "plan.safetensors").read_bytes()
    made, wanted = (folder / "exports" / "ragged-bf16" for folder in (out, scored))
    assert {path.name for path in made.iterdir()} == {path.name for path in wanted.iterdir()}
    for path in wanted.iterdir():  # the card has what was measured, the provenance the plan's rule
        if path.name not in ("README.md", "provenance.yaml"):
            assert (made / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("command", ["plan", "eval", "paper"])
def test_commands_that_work_in_one_place_name_those_that_take_more(command, capsys):
    for flag, value in (("--mesh", "data=2"), ("--coordinator", "auto"), ("--processes", "2")):
        with pytest.raises(SystemExit, match="2"):
            run(command, "demo", flag, value)
        told = capsys.readouterr().err
        assert f"there is no option {flag} here; " in told
        more = ["export", "apply", "verify"] if flag != "--mesh" else []
        for name in ("compress", "score", "compare", "audit", "recover", *more):
            assert name in told.partition("; ")[2]


@pytest.mark.parametrize("command", ["plan", "eval", "paper"])
def test_commands_that_work_in_one_place_are_not_started_in_several(
    command, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    words = {"paper": ["--output", tmp_path / "o"], "eval": ["--text", "t"]}.get(command, [])
    told = refused(capsys, tmp_path, command, tmp_path, *words)
    assert f"{command} works in one process; start one" in told and "recover take several" in told


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["model", "layer"])
def test_processes_train_as_one_also_after_one_of_them_was_killed(
    scored, texts, tmp_path, monkeypatch, mode
):
    def command(name: str) -> list[object]:
        return ["recover", scored, "--text", texts / "good.txt", "--output", tmp_path / name,
                "--mode", mode, "--balance", 0, "--tokens", 448, "--batch", 4, "--epochs", 6,
                "--export", "ragged-bf16", "--scratch", tmp_path / f"{name}-scratch"]  # fmt: skip

    assert run("--quiet", *command("one")) == 0
    # Process 0 dies between two checkpoints, or behind a layer that is done.
    number = 6 if mode == "model" else 2
    ends = run_in_all([f"*history.json*@{number}", ""], "--quiet", *command("two"))
    assert ends[0].returncode == -signal.SIGKILL, ends[0].stderr
    # Some versions of jax see it sooner, and end the process with words of their own.
    assert ends[1].returncode in (os.EX_TEMPFAIL, -signal.SIGABRT), ends[1].stderr
    assert not (tmp_path / "two" / "deltas.safetensors").exists()
    runs = [("two", 2, ()), ("four", 4, ()), ("halves", 2, ("--mesh", "expert=2"))]
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    for name, processes, more in runs if mode == "model" else runs[:1]:
        with monkeypatch.context() as patch:
            if more:
                patch.setenv("XLA_FLAGS", flags)
            ends = run_in_all([""] * processes, *command(name), *more)
        assert [end.returncode for end in ends] == [0] * processes, ends[0].stderr + ends[-1].stderr
        assert f"{processes} processes share the text" in ends[0].stderr
        assert not [*tmp_path.glob(f"{name}-scratch/*")]
        histories = [
            json.loads((tmp_path / n / "recover.json").read_text())["history"]
            for n in ("one", name)
        ]
        for theirs, ours in zip(*histories, strict=True):
            assert theirs.keys() == ours.keys()
            values = [np.hstack([np.hstack([*v.values()]) if isinstance(v, dict) else v
                                 for v in row.values()]) for row in (theirs, ours)]  # fmt: skip
            np.testing.assert_allclose(*values, rtol=2e-3)
        ours, theirs = (load_file(tmp_path / n / "deltas.safetensors") for n in (name, "one"))
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            # Adam divides by the size of a gradient, so where that is rounding the change is noise.
            off = np.abs(ours[key] - value) > 1e-2 * np.abs(value).max()
            assert off.mean() < 0.02, key


def test_windows_of_a_batch_that_cannot_be_shared_are_refused(scored, texts, tmp_path, capsys):
    def words(*more: object) -> str:
        told = ("recover", scored, "--text", texts / "good.txt", "--output", tmp_path / "o", *more)
        assert run(*told) == 2
        assert not (tmp_path / "o").exists()
        return capsys.readouterr().err

    places.check_batch(8, "model", 8, Spread(None, 0, 4))
    with pytest.raises(InputError, match=r"batch=6 .* by 4 devices; choose --batch 8, or less"):
        places.check_batch(6, "model", 8, Spread(None, 0, 4))
    with pytest.raises(InputError, match="use the axis data alone"):
        places.check_batch(8, "layer", 8, Spread(mesh(1, 2)))
    with pytest.raises(InputError, match="does not divide the 8 experts of a layer"):
        places.check_batch(8, "model", 8, Spread(mesh(1, 3)))
    assert "this process has 1; choose --mesh data=1" in words("--mesh", "data=2")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mesh": "data=0"}, "such as data=4"),
        ({"mesh": "4"}, "such as data=4"),
        ({"mesh": "data=2,data=2"}, "such as data=4"),
        ({"mesh": ""}, "such as data=4"),
        ({"coordinator": "host"}, "must be HOST:PORT, or auto"),
        ({"coordinator": "host:1", "processes": 2}, "give all three"),
        ({"coordinator": "host:1", "process_id": 0}, "give all three"),
        ({"processes": 2}, "give all three"),
        ({"coordinator": "auto", "process_id": 0}, "give all three"),
        ({"coordinator": "host:1", "processes": 2, "process_id": 2}, "less than processes=2"),
        ({"processes": 0}, "processes=0"),
        ({"process_id": -1}, "process_id=-1"),
    ],
)
def test_places_that_are_none_are_refused(options, words):
    with pytest.raises(InputError, match=re.escape(words)):
        PlaceOptions(**options)


def test_a_mesh_has_sizes_by_axis():
    assert PlaceOptions().axes == {}
    assert PlaceOptions(mesh="data=4").axes == {"data": 4}
    assert PlaceOptions(mesh="data=2,expert=10").axes == {"data": 2, "expert": 10}


RECIPE: dict[str, Any] = {"model": "m", "output": "o"}


def mesh(data: int, expert: int) -> Any:
    return SimpleNamespace(shape={"data": data, "expert": expert})


def test_without_a_text_there_is_nothing_to_deal():
    recipe = CompressionRecipe(**RECIPE, weights_only=True)
    places.check_places(recipe, Spread(), 8)
    with pytest.raises(InputError, match="weights_only reads no text"):
        places.check_places(recipe, Spread(None, 0, 2), 8)


def test_a_limit_of_memory_is_kept_by_processes_and_not_by_devices_of_a_cpu():
    recipe = CompressionRecipe(**RECIPE, memory_limit="8GB")  # type: ignore[arg-type]
    places.check_places(recipe, Spread(None, 1, 2), 8)
    with pytest.raises(InputError, match="every device of a CPU has its own"):
        places.check_places(recipe, Spread(mesh(2, 1)), 8)
    places.check_places(CompressionRecipe(**RECIPE), Spread(mesh(2, 1)), 8)


def test_experts_are_shared_evenly_or_not():
    recipe = CompressionRecipe(**RECIPE)
    places.check_places(recipe, Spread(mesh(1, 4)), 8)
    with pytest.raises(InputError, match=r"expert=6, .* the 8 experts of a layer; choose expert=4"):
        places.check_places(recipe, Spread(mesh(1, 6)), 8)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "12"}, True),
        ({"SLURM_NTASKS": "12"}, False),  # a batch script before its first step
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
    ],
)
def test_a_batch_system_says_whether_there_are_several_processes(environment, several):
    assert places.are_several(environment) == several


@pytest.mark.parametrize(
    ("options", "several", "joined"),
    [
        ({}, False, None),
        ({}, True, ()),
        ({"coordinator": "auto"}, False, ()),
        ({"coordinator": "h:1", "processes": 3, "process_id": 2}, False, ("h:1", 3, 2)),
    ],
)
def test_the_others_are_joined_once_by_hand_or_by_what_jax_finds(
    monkeypatch, options, several, joined
):
    calls, said = [], []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    monkeypatch.setattr(places, "are_several", lambda: several)
    steps: Any = SimpleNamespace(say=said.append)
    places._connect(PlaceOptions(**options), steps)
    assert calls == ([] if joined is None else [joined]) and len(said) == len(calls)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    places._connect(PlaceOptions(**options), steps)
    assert len(calls) == len(said)


def test_where_jax_finds_no_others_it_is_said(tmp_path, capsys, monkeypatch):
    def nowhere():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nowhere)
    told = refused(capsys, tmp_path, "score", "demo", "--output", tmp_path / "o",
                   "--coordinator", "auto")  # fmt: skip
    assert "jax finds no processes to join" in told and "--process-id I" in told


def test_idle_devices_and_other_processes_are_said(monkeypatch):
    said: list[str] = []
    steps: Any = SimpleNamespace(say=said.append)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    places.say_places(Spread(None, 0, 3), steps)
    assert "3 processes" in said[0] and "3 more devices are idle; --mesh data=4" in said[1]
    places.say_places(Spread(mesh(2, 2)), steps)
    assert len(said) == 2
    for batch, wanted in (
        (6, "; --mesh data=3 takes 3"),
        (8, "; --mesh data=4 takes all"),
        (5, ""),
    ):
        places.say_places(Spread(None, 0, 1), steps, batch)
        assert said[-1] == f"3 more devices are idle{wanted}"


def test_who_lost_another_process_ends_at_once_and_with_a_code_of_its_own(monkeypatch, capsys):
    ended = []

    def lost(options):
        raise LostProcess("connection reset")

    monkeypatch.setattr(sys.modules["pruning.cli.main"], "_run", lost)
    assert run("verify", "x") == os.EX_TEMPFAIL
    assert (
        "another process has ended: connection reset; the same command" in capsys.readouterr().err
    )
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", ended.append)
    run("verify", "x")
    assert ended == [os.EX_TEMPFAIL]


def test_the_job_set_of_the_readme_starts_the_command_once_a_host():
    (text,) = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    found = yaml.safe_load(text)
    assert found["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and found["kind"] == "JobSet"
    (job,) = found["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    assert job["replicas"] == 1 and inner["completionMode"] == "Indexed"
    assert inner["parallelism"] == inner["completions"] > 1 and inner["backoffLimit"] == 0
    (container,) = inner["template"]["spec"]["containers"]
    words = container["args"] if "args" in container else container["command"]
    line = " ".join(words).replace("\\\n", " ").split()
    assert f"--processes {inner['completions']}" in " ".join(line)
    host, port = line[line.index("--coordinator") + 1].split(":")
    # Pods are found as JOBSET-JOB-0-INDEX.JOBSET, the service that JobSet makes.
    name = found["metadata"]["name"]
    assert host == f"{name}-{job['name']}-0-0.{name}"
    assert int(port) in [one["containerPort"] for one in container["ports"]]
    volumes = {one["name"] for one in inner["template"]["spec"]["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == volumes
