"""Repair of layers in groups of experts beside that of whole layers."""

import dataclasses
import json
from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from convert import open_checkpoint
from moe_jax.groups import each_group
from moe_jax.spread import ALONE
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import Allowance, allowing
from pruning.shrink.prune import PrunedSource
from pruning.shrink.repair_model import repair_model, repaired_in, with_repair
from pruning.stages.between_sizes import of_repair
from tests.support import tiny

RNG = np.random.default_rng(1)
TOKENS = RNG.integers(0, 96, (11, 24)).astype(np.int32)
VALID = np.arange(24)[None] < RNG.integers(12, 25, (11, 1))
FAMILIES = {
    "deepseek_v3": {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1},
    "gpt_oss": {},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of a tiny model of a family."""

    @cache
    def made(family):
        folder = tmp_path_factory.mktemp(family) / "model"
        tiny.save(tiny.tiny_model(family, **FAMILIES[family]), folder)
        return folder

    return made


def opened(folder, experts=None):
    source = open_checkpoint(folder)
    source.experts_at_once = experts
    return source


def plan_of(config) -> PruningPlan:
    """The first layer whole, in others an expert whole and one empty."""
    shape = len(config.moe_layers), config.moe.num_experts, config.moe.d_expert
    keep = np.random.default_rng(0).random(shape) < 0.5
    keep[0] = len(keep) > 1
    keep[-1, 2], keep[-1, 4] = True, False
    return PruningPlan(keep, config.moe_layers)


def repaired(source, folder, mode="layer", dtype=jnp.float32, spread=ALONE):
    plan = plan_of(source.config)
    found = repair_model(
        source, plan, TOKENS, VALID, folder, mode=mode, provenance={}, batch=4, dtype=dtype,
        spread=spread,
    )  # fmt: skip
    return with_repair(PrunedSource(source, plan), plan, folder), found


CASES = [
    ("deepseek_v3", "layer", jnp.float32),
    ("deepseek_v3", "layer", jnp.bfloat16),
    ("gpt_oss", "expert", jnp.float32),
]


@pytest.mark.parametrize("family, mode, dtype", CASES)
def test_a_repair_in_groups_is_that_of_whole_layers(
    models, family, mode, dtype, tmp_path, scratch_files
):
    model = models(family)
    _, wanted = repaired(opened(model), tmp_path / "whole", mode, dtype)
    with allowing(Allowance(room=0)):  # Grams are made again, states lie in files
        _, found = repaired(opened(model, 3), tmp_path / "groups", mode, dtype)
    config, kept = opened(model).config, plan_of(opened(model).config).keep.sum(axis=(1, 2))
    # 10 and 1 windows in batches of 4, and weights of 32 bits here.
    states, changes, *made = of_repair(config, (12 + 4) * 24, int(kept[-1]))
    if len(kept) == 1:  # all forms of one layer
        assert scratch_files == [states, 2 * made[0], changes, 2 * made[1]]
    assert any(one.changed for one in wanted)
    exact = family != "gpt_oss"  # whose biases a whole layer adds up by themselves
    for one, other in zip(wanted, found, strict=True):
        assert dataclasses.replace(other, errors=one.errors) == one
        assert other.errors == pytest.approx(one.errors, rel=0 if exact else 1e-4, abs=0)
        files = [repaired_in(tmp_path / name) for name in ("whole", "groups")]
        theirs, ours = (file.arrays(one.index) for file in files)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            limit = 0 if exact else 1e-3 * np.abs(value).max()
            np.testing.assert_allclose(ours[key], value, atol=limit, rtol=0)
    if exact:
        said = [json.loads((tmp_path / n / "repair.json").read_text()) for n in ("whole", "groups")]
        assert said[0] == said[1]  # digests of files and all


@pytest.mark.parametrize("family", FAMILIES)
def test_repaired_weights_are_read_by_group(models, family, tmp_path):
    model = models(family)
    whole, _ = repaired(opened(model), tmp_path / "whole")
    plan = plan_of(whole.config)
    grouped = with_repair(PrunedSource(opened(model, 3), plan), plan, tmp_path / "whole")
    for slot, index in enumerate(plan.layer_indices):
        layer, groups = whole.layer(index).mlp.experts, [*each_group(grouped, index)]
        assert len(groups) == 3
        counts = [plan.keep[slot, group.mlp.own].sum() for group in groups]
        down = [
            np.asarray(group.mlp.experts.w_down)[:count]
            for group, count in zip(groups, counts, strict=True)
        ]
        np.testing.assert_array_equal(np.concatenate(down), layer.w_down[: sum(counts)])
        if layer.b_down is not None:
            bias = np.concatenate([group.mlp.experts.b_down for group in groups])
            np.testing.assert_array_equal(bias, layer.b_down)
