"""Run with several virtual devices: trains students on meshes of them, and keeps what changed."""

import dataclasses
import sys
from pathlib import Path

import numpy as np

import tests.conftest  # noqa: F401
from moe_jax.mesh import mesh_of
from moe_jax.spread import ALONE, Spread
from moe_jax.structure import named_leaves
from pruning.recovery.course import Course, FitOptions, TrainingText, own_part
from pruning.recovery.deltas import DeltaConfig, Deltas
from pruning.recovery.fit import fit
from pruning.recovery.layerwise import fit_layers
from pruning.recovery.loss import predicted
from pruning.recovery.teacher import prediction_type
from tests.pruning.recovery.students import CONFIG, dense_model, pruned_model

MESHES = {"data": {"data": 4}, "expert": {"expert": 2}, "both": {"data": 2, "expert": 2}}
CONFIGS = {
    "full": DeltaConfig(train="full", router_rank=0),
    "full-int4": DeltaConfig(train="full", router_rank=0, group_size=32),
    "dora": DeltaConfig(rank=2, alpha=4.0, attention_rank=2),
    "biased": DeltaConfig(train="lora", rank=2, alpha=4.0, attention_rank=2, group_size=32),
}
OPTIONS = FitOptions(learning_rate=0.01, batch=4, accumulate=2, share_from=0.5, measurements=2)


def course_of(kind: str, spread: Spread = ALONE, layers: bool = False) -> Course:
    """A short training on random lines, some of them cut off, and a random teacher."""
    rng, windows = np.random.default_rng(7), 13
    tokens = rng.integers(0, 48, (windows, 10)).astype(np.int32)
    valid = np.arange(10)[None] < rng.integers(4, 11, windows)[:, None]
    said = np.zeros(tokens.shape, prediction_type(4))
    for place in np.ndindex(tokens.shape):
        said[place]["token"] = rng.permutation(48)[:4]
    said["logp"] = np.log(rng.dirichlet(np.ones(5), tokens.shape)[..., :4] + 1e-9)
    wanted = valid if layers else predicted(valid)

    def text(whole: range, own: range) -> TrainingText:
        part = slice(whole.start + own.start, whole.start + own.stop)
        counts = wanted[whole.start : whole.stop].sum(1)
        return TrainingText(
            tokens[part], valid[part], wanted[part], said[part], own.start, counts
        )  # fmt: skip

    train, held = range(10), range(10, windows)
    return Course(
        text(train, own_part(spread, OPTIONS.batch, len(train))),
        text(held, spread.in_a_row(len(held))),
        CONFIGS[kind],
        # At the other rate their beginning stays the best, and nothing would be compared.
        dataclasses.replace(OPTIONS, learning_rate=0.001)
        if layers or kind == "biased"
        else OPTIONS,
        spread=spread,
    )


def trained(kind: str, spread: Spread = ALONE, layers: bool = False) -> dict[str, np.ndarray]:
    """The changes by name, and the held-out losses; of "biased" experts and routers have biases,
    and a shared expert stands beside them."""
    moe = dataclasses.replace(
        CONFIG.moe, expert_bias=True, logit_bias=True, d_shared=32, shared_gate=True
    )
    dense = dense_model(dataclasses.replace(CONFIG, moe=moe) if kind == "biased" else CONFIG)
    student, course, told = pruned_model(dense), course_of(kind, spread, layers), []
    found: Deltas = {}
    if layers:
        found = fit_layers(
            dense, student, course, on_layer=lambda _, losses: told.append(losses["after"])
        )
    else:
        found = fit(student, course, on_held_out=lambda _, losses: told.append(losses["loss"]))
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(found).items()}
    return {**leaves, "held_out": np.array(told)}


def main(folder: Path) -> None:
    """Write KIND-MESH.npz for every kind on every mesh, and layers-data.npz."""
    for name, axes in MESHES.items():
        for kind in CONFIGS:
            np.savez(folder / f"{kind}-{name}.npz", **trained(kind, Spread(mesh_of(axes))))
    np.savez(folder / "layers.npz", **trained("full", Spread(mesh_of(MESHES["data"])), True))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
