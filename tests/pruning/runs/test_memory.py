"""No stage of `compress` takes more memory than `estimate` said, and none of its processes does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import expected_tensors, find_family, write_folder
from tests.support import tiny

# Layers that weigh, of which an estimate must know how many are held: 53 M weights in each.
LAYERS = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 1024,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
}
# A vocabulary whose head and logits weigh, and hardly anything else.
VOCABULARY = LAYERS | {
    "vocab_size": 1 << 17,
    "hidden_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 64,
    "num_experts": 8,
}
STAGES = {"score": "scoring", "measure": "choice", "repair": "repair", "export": "export",
          "verify": "verify", "evaluate": "evaluation", "sample": "sample"}  # fmt: skip
RUN = """
import json, resource, sys
from pruning.cli import main
from pruning.stages import client
code = main(sys.argv[1:])
client._end()  # its peak counts once it is gone
print(json.dumps([code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""

SCORE = """
import resource, sys
from pruning.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""
# The peak of a process includes that of the one that forked it: a small one, not the tests' worker.
SMALL = ("sh", "-c", '"$@"; exit $?', "sh")


def written(config: dict, folder: Path) -> Path:
    family, bfloat16 = find_family("qwen3_moe"), np.dtype(ml_dtypes.bfloat16)
    shapes = expected_tensors(family, family.config_from_hf(config))
    rng = np.random.default_rng(0)
    noise = (0.03 * rng.standard_normal(1 << 21, np.float32)).astype(bfloat16)
    values = ((name, np.resize(noise, shape)) for name, shape in shapes.items())
    specs = {name: (bfloat16, shape) for name, shape in shapes.items()}
    return tiny.add_tokenizer(write_folder(folder, specs, values, config, None))


def run(code: str, *arguments) -> str:
    """What a process of its own prints."""
    # Compiled as users compile for the first time, not as the tests do.
    of_tests = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in of_tests}
    done = subprocess.run(
        [*SMALL, sys.executable, "-c", code, *arguments, "--quiet"], env=environment,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def foretold(model: Path, options: list[str], said: Path) -> dict[str, int]:
    """Bytes of each stage by `estimate`."""
    run("import sys; from pruning.cli import main; sys.exit(main(sys.argv[1:]))",
        "estimate", str(model), "--no-probe", "--json", str(said), *options)  # fmt: skip
    (found,) = json.loads(said.read_text())
    return found["memory"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [[], ["--gradients"], ["--obs"], ["--expert-details"]],
    ids=lambda words: "".join(words),
)
def test_scoring_takes_no_more_than_the_estimate_says(asked, tmp_path):
    model = written(LAYERS, tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 600)
    options = ["--calibration", str(text), "--max-tokens", "4096", "--window", "512", "--planner",
               "fair", "--repair", "none", "--output", str(tmp_path / "out"), *asked]  # fmt: skip
    memory = foretold(model, options, tmp_path / "said.json")
    peak = int(run(SCORE, "score", str(model), *options).splitlines()[-1])
    assert memory["scoring"] / 2 <= peak <= memory["scoring"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "repair"), [(LAYERS, "layer"), (VOCABULARY, "none")], ids=["layers", "vocabulary"]
)
def test_no_stage_takes_more_than_the_estimate_says(config, repair, tmp_path):
    model = written(config, tmp_path / "model")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    options = ["--calibration", str(text), "--max-tokens", "512", "--window", "64", "--batch", "4"]
    options += ["--prune-rate", "0.25", "--export", "ragged-int4", "--output", str(out)]
    options += ["--repair", repair]
    memory = foretold(model, options, tmp_path / "said.json")
    code, children = json.loads(run(RUN, "compress", str(model), *options).splitlines()[-1])
    report = json.loads((out / "report.json").read_text())
    assert code == 0 and all(check["done"] for check in report["verification"])
    seen: dict[str, int] = {}
    for stage in report["stages"]:
        key = STAGES.get(stage["name"].split()[0])
        if key is not None:
            seen[key] = max(seen.get(key, 0), stage["peak_memory_bytes"])
    assert seen.keys() == set(STAGES.values()) - ({"repair"} if repair == "none" else set())
    for key, peak in [*seen.items(), ("transformers", children)]:
        assert peak <= memory[key], (key, peak, memory)
        # Nor is it a number that nothing ever comes near.
        assert peak >= memory[key] / 2, (key, peak, memory)
