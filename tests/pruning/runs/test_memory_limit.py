"""A checkpoint that is several times what a limit leaves goes through all commands within it."""

import json
import os
import subprocess
import sys

import pytest

from pruning.runs.held import GRADIENT_PROGRAMS, PROCESS_BYTES
from tests.pruning.runs.test_memory import LAYERS, SMALL, written
from tests.support import deepseek

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
import json, resource, sys
from pruning.cli import main
code = max(main(words) for words in json.loads(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code)
"""


# A layer of 48 experts, 151 MB in 16 bits, stored in 8-bit floats: it alone is more than the limit
# leaves. Beside it a small one without experts, a shared expert, and routing within 4 of 8 groups.
ONE_LAYER = {
    "hidden_size": 1024, "intermediate_size": 1024, "moe_intermediate_size": 512,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
}  # fmt: skip


def peak(commands: list[list[str]], limit: int) -> int:
    """Peak memory of a process that runs commands under a limit, or their own, bytes."""
    # Compiled as users compile for the first time: these weights are many, and so are programs.
    of_tests = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in of_tests}
    usual = ["--memory-limit", str(limit)]
    given = [[*command, "--quiet", *([] if usual[0] in command else usual)] for command in commands]
    run = [*SMALL, sys.executable, "-c", RUN, json.dumps(given)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1])


@pytest.mark.slow
def test_a_layer_that_is_more_than_the_limit_leaves_is_taken_in_groups_of_experts(tmp_path):
    model = deepseek.checkpoint(tmp_path / "model", 48, **ONE_LAYER)
    limit, layer = 760_000_000, 2 * 3 * 48 * 512 * 1024
    assert layer > 1.3 * (limit - PROCESS_BYTES - (20 << 20))
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    score = ["score", str(model), "--calibration", str(text), "--window", "64", "--batch", "4"]
    score += ["--max-tokens", "256", "--planner", "fair", "--gradients", "--output", str(out)]
    score += ["--memory-limit", "810MB"]  # for programs of gradients that take less than is thought
    commands = [
        score, ["plan", str(out), "--prune-rate", "0.25"],
        ["export", str(out), "--export", "ragged-int4", "--repair", "expert"],
        ["verify", str(out), "--json", str(out / "checks.json")],
    ]  # fmt: skip
    assert peak(commands, limit) <= limit
    checks = {check["check"]: check for check in json.loads((out / "checks.json").read_text())}
    assert checks["tensors"]["done"] and checks["logits in JAX"]["done"]


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
    peaks = {command[0]: peak([command], LIMIT) for command in commands}
    assert max(peaks.values()) <= LIMIT, peaks
    assert max(peaks.values()) >= LIMIT / 2, peaks  # it is what they work with
    checks = json.loads((tmp_path / "checks.json").read_text())
    said = {check["check"]: check for check in checks}
    assert said["tensors"]["done"] and said["logits in JAX"]["done"]
    # 32 bits for each weight do not fit beside this process: that program is not asked.
    undone = said["logits in transformers"]
    assert not undone["done"] and "MB are free" in undone["detail"]
