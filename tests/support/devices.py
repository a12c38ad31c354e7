"""Run with several virtual devices: collects statistics on four of them, and scores on two."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

import tests.conftest  # noqa: F401
from moe_jax.mesh import mesh_of
from moe_jax.spread import Spread
from moe_jax.structure import named_leaves
from moe_jax.transformer import init
from pruning.scores.collect import collect_statistics
from tests.pruning.scores.test_layer import CONFIG
from tests.support.command import run


def main(folder: Path, *arguments: str) -> int:
    """Write `statistics.npz` and, with obs, `obs.npz` of `text.npz` in a folder, and `parts.json`:
    what of a layer's arrays a device has. Then run the command line."""
    model = jax.tree.map(lambda a: a * 10 if a.ndim == 2 else a, init(CONFIG, jax.random.key(0)))
    with np.load(folder / "text.npz") as text:
        tokens, valid = text["tokens"], text["valid"]
    spread = Spread(mesh_of({"data": 2, "expert": 2}))
    found = collect_statistics(model, tokens, valid, gradients=True, batch=3, spread=spread)
    np.savez(folder / "statistics.npz", **found.arrays())
    spread = Spread(mesh_of({"data": 2}))
    found = collect_statistics(model, tokens, valid, obs=True, batch=1, spread=spread)
    np.savez(folder / "obs.npz", **found.arrays())
    spread = Spread(mesh_of({"data": 2, "expert": 2}))
    leaves = named_leaves(spread.everywhere(model.layers[0]))
    parts = {name: leaf.addressable_shards[0].data.shape for name, leaf in leaves.items()}
    (folder / "parts.json").write_text(json.dumps(parts))
    return run(*arguments)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
