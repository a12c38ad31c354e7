"""One writer per output folder: a second is refused at once, a dead one is in nobody's way."""

import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest

from moe_jax.errors import InputError
from pruning import plan_folder
from pruning.stages.writer import only_writer
from tests.support.command import given, read, refused, run

HOLD = """
import errno, fcntl, sys
from pruning.stages.writer import only_writer

def no_locks(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")

if sys.argv[2] == "no locks":
    fcntl.flock = no_locks
with only_writer(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts a process that holds the lock of a folder until it is killed."""
    started = []

    def hold(folder, kind="locks") -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(folder), kind]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def commands(models, texts, out) -> list[tuple]:
    """Every command that writes into an output folder."""
    recipe = (models / "single", *read(texts, out), "--overwrite")
    text = ("--text", texts / "good.txt")
    return [
        ("compress", *recipe), ("score", *recipe), ("compare", *recipe), ("audit", *recipe),
        ("plan", out), ("plan", out, "--prune-rate", 0.25, 0.5),
        ("export", out, "--overwrite"), ("audit", out), ("report", out),
        ("eval", out, *text, "--prune-rate", 0.25, 0.5),
        ("apply", out, models / "single", "--output", out, "--overwrite"),
    ]  # fmt: skip


def test_a_second_process_is_refused_with_the_first_ones_pid_host_and_start(
    models, texts, scored, tmp_path, capsys, holder
):
    out = shutil.copytree(scored, tmp_path / "out")
    partial = out / "exports" / "padded-bf16.tmp-0123456789abcdef"  # of a live one
    first = holder(out)
    partial.mkdir()
    for command in commands(models, texts, out):
        shown = refused(capsys, tmp_path, *command)
        assert f"process {first.pid} on {socket.gethostname()}, started 2" in shown, command
        assert f"UTC, is writing into {out}; wait for it or name another folder" in shown, command
    # readers go on
    assert run("eval", out, "--text", texts / "good.txt", "--prune-rate", 0.5) == 0
    # and so does everybody once it is dead
    first.kill()
    first.wait()
    assert run("plan", out, "--prune-rate", 0.5) == 0
    assert not partial.exists()
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_plans_of_a_sweep_are_held_with_their_folder(scored, tmp_path, capsys, holder):
    out = shutil.copytree(scored, tmp_path / "out")
    assert run("plan", out, "--prune-rate", 0.25, 0.5) == 0
    one = out / "plans" / "0.5"
    process = holder(one)
    shown = refused(capsys, tmp_path, "plan", out, "--prune-rate", 0.25, 0.5)
    assert f"process {process.pid} on" in shown and f"writing into {one}" in shown
    process.kill()
    process.wait()
    holder(out)
    assert f"writing into {one}" in refused(capsys, tmp_path, "plan", one)


def test_a_thread_nests_and_another_is_refused(scored, tmp_path, monkeypatch):
    out, said = shutil.copytree(scored, tmp_path / "out"), []

    def other():
        try:
            plan_folder(out)
        except InputError as error:
            said.append(str(error))

    with only_writer(out):
        monkeypatch.chdir(out.parent)
        with only_writer("out"):
            plan_folder(out, prune_rate=0.5)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert re.match(rf"process {os.getpid()} on .* is writing into {out}", said[0])
    plan_folder(out, prune_rate=0.5)


def test_a_refused_run_makes_no_folder(models, texts, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    shown = refused(capsys, tmp_path, "score", models / "single", *given(texts, out, "absent.txt"))
    assert "absent.txt" in shown


def test_without_locks_a_file_is_one(scored, tmp_path, capsys, holder, monkeypatch):
    out = shutil.copytree(scored, tmp_path / "out")
    process = holder(out, "no locks")

    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    shown = refused(capsys, tmp_path, "plan", out, "--prune-rate", 0.5)
    assert f"process {process.pid} on {socket.gethostname()}" in shown
    assert f"and if it has died, remove {out}/.lock.marker" in shown
    # one of this host that was killed is taken over
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / ".lock.marker").exists()
    assert run("plan", out, "--prune-rate", 0.5) == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
