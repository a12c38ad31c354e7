"""Who reads the output may stop reading, as `... | head` does: the command ends quietly."""

import os
import subprocess
import sys

import pytest

COMMANDS = {
    "help": ["--help"],
    "help of a command": ["compress", "--help"],
    "completion": ["completion", "bash"],
    "a table": ["inspect", "MODEL"],
    "json": ["inspect", "MODEL", "--json", "-"],
}


@pytest.mark.parametrize("both", [False, True], ids=["output", "output and errors"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_has_gone_ends_a_command_quietly(name, both, models):
    command = [str(models / "single") if part == "MODEL" else part for part in COMMANDS[name]]
    reading, writing = os.pipe()
    os.close(reading)  # from now on every write to the other end fails
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pruning", *command],
            stdout=writing,
            stderr=writing if both else subprocess.PIPE,
            timeout=300,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr or b"") == (0, b"")
