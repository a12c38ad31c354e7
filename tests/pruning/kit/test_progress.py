"""What every stage cost, and what people see of it."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pruning.kit.progress import Steps, counter, peak_memory, reset_peak_memory

TWO_STAGES = """
import json, sys
import numpy as np
from pruning.kit.progress import Steps
steps = Steps(quiet=True)
with steps.bar("large"):
    held = np.ones(200 << 20, np.uint8)
del held
with steps.bar("small"):
    np.ones(1 << 20, np.uint8)
print(json.dumps([stage["peak_memory_bytes"] for stage in steps.stages]))
"""


def test_a_stage_reports_its_own_peak_and_not_that_of_an_earlier_one():
    done = subprocess.run([sys.executable, "-c", TWO_STAGES], capture_output=True, text=True)
    large, small = json.loads(done.stdout)
    assert 190e6 < large - small < 230e6, done.stdout + done.stderr


def test_stages_are_remembered_in_order_and_end_complete(capsys):
    steps = Steps()
    with steps.bar("first") as on_step:
        on_step(1, 3)
    with steps.bar("second"):
        pass
    steps.say("a line [with brackets] that is not wrapped " + "x" * 100)
    shown = capsys.readouterr().err
    assert [stage["name"] for stage in steps.stages] == ["first", "second"]
    assert "3/3" in shown and "1/1" in shown
    assert "a line [with brackets] that is not wrapped " + "x" * 100 in shown


def test_quiet_steps_show_nothing(capsys):
    steps = Steps(quiet=True)
    with steps.bar("hidden"):
        steps.say("hidden too")
    assert capsys.readouterr().err == ""
    assert steps.stages[0]["seconds"] >= 0


def test_verbose_steps_say_what_a_stage_took_and_quiet_wins(capsys):
    for steps, shown in ((Steps(), False), (Steps(verbose=True), True),
                         (Steps(verbose=True, quiet=True), False)):  # fmt: skip
        with steps.bar("stage"):
            steps.detail("a detail")
        found = capsys.readouterr().err
        assert ("a detail" in found) == shown
        assert ("MB of memory" in found) == shown


def test_steps_are_counted_to_what_was_announced():
    told = []
    count = counter(5, lambda *step: told.append(step))
    for steps in (1, 3, 0, 1):
        count(steps)
    assert told == [(1, 5), (4, 5), (4, 5), (5, 5)]
    counter(2, None)(1)  # nobody listens


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count otherwise")
def test_the_peak_of_a_process_is_in_bytes():
    def of_its_life() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    held = bytearray(b"x") * (64 << 20)
    del held
    assert reset_peak_memory()
    before = of_its_life()
    assert before <= peak_memory() <= of_its_life()
    text = Path("/proc/self/status").read_text()
    (kilobytes,) = (line.split()[1] for line in text.splitlines() if line.startswith("VmHWM:"))
    assert abs(peak_memory(since_reset=True) - 1024 * int(kilobytes)) < 16 << 20
