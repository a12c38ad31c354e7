"""A checkpoint that is several times what a limit leaves goes through all commands within it."""

import json
import os
import subprocess
import sys

import pytest

from pruning.runs.held import GRADIENT_PROGRAMS, PROCESS_BYTES
from tests.pruning.runs.test_memory import LAYERS, written

LIMIT = 820_000_000  # of which a process takes most before it holds any weight
# 24 layers of 14 MB in 16 bits: of neither kind fits the model, nor does its export as float32.
MODEL = LAYERS | {
    "hidden_size": 512,
    "num_hidden_layers": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
}
RUN = """
import resource, sys
from pruning.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""
# The peak of a process includes that of the one that forked it: a small one, not the tests' worker.
SMALL = ("sh", "-c", '"$@"; exit $?', "sh")


@pytest.mark.slow
def test_every_command_stays_within_a_limit_that_the_model_exceeds_several_times(tmp_path):
    model = written(MODEL, tmp_path / "model")
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert size > 3.9 * (LIMIT - PROCESS_BYTES - GRADIENT_PROGRAMS)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    window = ("--window", "64", "--batch", "4")
    commands = [
        ["score", str(model), "--calibration", str(text), *window, "--gradients", "--planner",
         "fair", "--repair", "none", "--output", str(out)],
        ["plan", str(out), "--prune-rate", "0.25"],
        ["export", str(out), "--export", "ragged-int4"],
        ["verify", str(out), "--json", str(tmp_path / "checks.json")],
        ["eval", str(out / "exports/ragged-int4"), "--text", str(text), *window],
    ]  # fmt: skip
    # Compiled as users compile for the first time: these weights are many, and so are programs.
    of_tests = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in of_tests}
    peaks = {}
    for command in commands:
        done = subprocess.run(
            [*SMALL, sys.executable, "-c", RUN, *command, "--quiet", "--memory-limit", str(LIMIT)],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        peaks[command[0]] = int(done.stderr.split()[-1])
    assert max(peaks.values()) <= LIMIT, peaks
    assert max(peaks.values()) >= LIMIT / 2, peaks  # it is what they work with
    checks = json.loads((tmp_path / "checks.json").read_text())
    said = {check["check"]: check for check in checks}
    assert said["tensors"]["done"] and said["logits in JAX"]["done"]
    # 32 bits for each weight do not fit beside this process: that program is not asked.
    undone = said["logits in transformers"]
    assert not undone["done"] and "MB are free" in undone["detail"]
