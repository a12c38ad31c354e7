"""A command given to several processes of this machine, which find each other by a free port."""

import socket
import subprocess
import sys
from collections.abc import Sequence

# The process ends itself, as if killed, when a file of that name is on the disk, or NAME@3 the
# third time.
RUN = """
import os, signal, sys
from pathlib import Path
(moment, _, number), arguments = sys.argv[1].partition("@"), sys.argv[2:]
fsync, left = os.fsync, [int(number or 1)]

def stopping_fsync(descriptor):
    if moment and Path(os.readlink(f"/proc/self/fd/{descriptor}")).match(moment):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
    fsync(descriptor)

os.fsync = stopping_fsync
import tests.conftest
from pruning.cli import main
sys.exit(main(arguments))
"""
SECONDS = 120


def run_in_all(
    moments: Sequence[str], *arguments: object
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in as many processes as there are moments, of which each ends one; "" none."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(len(moments))]
    words = [*map(str, arguments), *places, "--process-id"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RUN, moment, *words, str(process)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for process, moment in enumerate(moments)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=SECONDS) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, said, strict=True)
    ]
