"""A checkpoint larger than the memory it may use is read layer by layer."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np

from convert import expected_tensors, find_family, write_folder

LAYERS = 8
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 512,
    "num_experts": 12,
    "num_experts_per_tok": 2,
}
SWEEP = """
import jax, resource, sys
from convert import open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
source = open_checkpoint(sys.argv[1])
before = (source.embedding.weight.block_until_ready(), peak())[1]
for indices in (range(len(source)), reversed(range(len(source)))):
    for index in indices:
        jax.block_until_ready(jax.tree.leaves(source.layer(index)))
print(peak() - before)
"""


def test_sweeping_over_the_layers_holds_two_of_them_at_most(tmp_path):
    family = find_family("qwen3_moe")
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    shapes = expected_tensors(family, family.config_from_hf(CONFIG))
    specs = {name: (bfloat16, shape) for name, shape in shapes.items()}
    ones = ((name, np.ones(shape, bfloat16)) for name, shape in shapes.items())
    folder = write_folder(tmp_path / "model", specs, ones, CONFIG, None, shard_bytes=100e6)
    per_layer = sum(f.stat().st_size for f in folder.glob("*.safetensors")) / LAYERS
    # large arrays of real models bypass the heap anyway; here they must not fragment it
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, str(folder)],
        capture_output=True, text=True, check=True, env=environment,
    )  # fmt: skip
    # one in use, one being read ahead, and single experts on their way into the pool
    assert json.loads(done.stdout) < 2.3 * per_layer  # of eight
