"""Seconds per layer of `score` on a checkpoint with layers of Qwen3-30B-A3B, and what it reads.

`python tests/bench/bench_score.py [--layers 2] [--experts 64] [--gradients]`

Random weights are written to a temporary folder and scored on 8,192 tokens in four parts; a first
run over fewer tokens compiles. Half of the layers' 128 experts, the default, takes less than 3 GB
of memory. To compare two versions, run it with PYTHONPATH set to the folder of each.
"""

import argparse
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from convert import expected_tensors, find_family, write_folder
from convert.reader import SafetensorsFolder
from pruning.kit.progress import Steps, peak_memory
from pruning.recipe.recipe import CompressionRecipe
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.job import open_job
from tests.support import tiny

WINDOW, BATCH, TOKENS = 512, 2, 8192


def checkpoint(folder: Path, layers: int, experts: int) -> Path:
    """Write the model."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 1024,
        "hidden_size": 2048, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": experts, "num_experts_per_tok": 8,
        "max_position_embeddings": 512,
    }  # fmt: skip
    family, bfloat16 = find_family("qwen3_moe"), np.dtype(ml_dtypes.bfloat16)
    shapes = expected_tensors(family, family.config_from_hf(config))
    noise = np.random.default_rng(0).standard_normal(1 << 21, np.float32)
    noise = (0.02 * noise).astype(bfloat16)
    values = ((name, np.resize(noise, shape)) for name, shape in shapes.items())
    specs = {name: (bfloat16, shape) for name, shape in shapes.items()}
    return tiny.add_tokenizer(write_folder(folder, specs, values, config, None))


def scored(model: Path, out: Path, text: Path, tokens: int, gradients: bool) -> list[float]:
    """Score a model; seconds of the clock and of the processors, and bytes read."""
    read, true = [], SafetensorsFolder.read_part

    def part(self, name, first, shape):
        found = true(self, name, first, shape)
        read.append(found.nbytes)
        return found

    recipe = CompressionRecipe(
        model=str(model), output=str(out), calibration=(str(text),), max_tokens=tokens,
        window=WINDOW, batch=BATCH, gradients=gradients, planner="fair", bits=16,
    )  # fmt: skip
    SafetensorsFolder.read_part = part
    try:
        started, worked = time.perf_counter(), time.process_time()
        job, steps = open_job(recipe, measures=False), Steps(quiet=True)
        preflight.prepare(job, steps, exports=False)
        scoring.score(job, steps)
        return [time.perf_counter() - started, time.process_time() - worked, sum(read)]
    finally:
        SafetensorsFolder.read_part = true


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=64, help="of 128")
    parser.add_argument("--gradients", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        model, text = checkpoint(home / "model", options.layers, options.experts), home / "text.txt"
        words = np.random.default_rng(0).integers(0, 1000, 4 * TOKENS)
        text.write_text(" ".join(f"{word:x}" for word in words))
        stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        scored(model, home / "warm", text, 4 * BATCH * WINDOW, options.gradients)
        clock, worked, read = scored(model, home / "out", text, TOKENS, options.gradients)
    layers = options.layers
    print(
        f"{clock / layers:.1f} s a layer, {worked / layers:.1f} s of the processors, "
        f"{read / stored:.2f} times the checkpoint read, at most {peak_memory() / 1e9:.1f} GB"
    )


if __name__ == "__main__":
    main()
