"""Run with several virtual devices: restores a model over them and tells where its arrays lie."""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from moe_jax import restore_model, save_model
from moe_jax.sharding import split_over
from moe_jax.structure import named_leaves


def main(folder: Path) -> None:
    """Restore `model`, save it again as `again`; write `placed.json` and `logits.npy`."""
    jax.config.update("jax_default_matmul_precision", "highest")
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    model = restore_model(folder / "model", sharding=split_over(mesh))
    placed = {name: _parts(leaf) for name, leaf in named_leaves(model).items()}
    (folder / "placed.json").write_text(json.dumps(placed))
    tokens = np.load(folder / "tokens.npy")
    np.save(folder / "logits.npy", jax.jit(lambda m, t: m(t))(model, tokens))
    save_model(folder / "again", model)


def _parts(leaf: jax.Array) -> dict[str, list]:
    """Device -> shape and start of its part."""
    return {
        str(part.device.id): [list(part.data.shape), [axis.start or 0 for axis in part.index]]
        for part in leaf.addressable_shards
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
