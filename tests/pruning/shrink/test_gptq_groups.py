"""GPTQ of layers in groups of experts beside that of whole layers."""

import json
from operator import attrgetter

import jax
import numpy as np
import pytest

from convert import open_checkpoint
from moe_jax.groups import each_group
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import Allowance, allowing
from pruning.shrink.gptq_model import quantize_model, with_codes
from pruning.shrink.prune import PrunedSource
from pruning.stages.between_sizes import of_gptq
from tests.support import tiny

RNG = np.random.default_rng(1)
TOKENS = RNG.integers(0, 96, (9, 24)).astype(np.int32)
VALID = np.arange(24)[None] < RNG.integers(12, 25, (9, 1))
GROUP = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A layer without experts, then one with a shared expert and routing within groups."""
    folder = tmp_path_factory.mktemp("gptq") / "model"
    changes = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}
    return tiny.save(tiny.tiny_model("deepseek_v3", **changes), folder)


@pytest.fixture(scope="module")
def plan(model):
    """Whole groups of channels; one expert is whole and one empty."""
    config = open_checkpoint(model).config
    shape = len(config.moe_layers), config.moe.num_experts, config.moe.d_expert // GROUP
    keep = np.random.default_rng(0).random(shape) < 0.5
    keep[:, 2], keep[:, 4] = True, False
    return PruningPlan(np.repeat(keep, GROUP, axis=2), config.moe_layers)


def quantised(model, plan, folder, experts):
    base = open_checkpoint(model)
    base.experts_at_once = experts
    pruned = PrunedSource(base, plan)
    how = {"group_size": GROUP, "provenance": {}, "batch": 4}
    errors = quantize_model(pruned, TOKENS, VALID, folder, **how)
    return with_codes(pruned, folder, GROUP), errors


def test_codes_chosen_in_groups_are_those_of_whole_layers(model, plan, tmp_path, scratch_files):
    whole, wanted = quantised(model, plan, tmp_path / "whole", None)
    with allowing(Allowance(room=0)):  # codes and states lie in files
        grouped, found = quantised(model, plan, tmp_path / "groups", 4)
    config, batch = open_checkpoint(model).config, 4
    # 8 and 1 windows in batches of 4.
    assert sorted(scratch_files) == sorted(of_gptq(config, (8 + batch) * 24, batch * 24, GROUP))
    assert found == wanted
    assert 0 < wanted[1].fallbacks < wanted[1].matrices
    said = [json.loads((tmp_path / n / "gptq.json").read_text()) for n in ("whole", "groups")]
    assert said[0] == said[1]  # digests of files and all
    # And each group reads its own of them.
    layer, groups = whole.layer(1).mlp.experts, [*each_group(grouped, 1)]
    counts = [int(np.asarray(group.mlp.experts.count).sum()) for group in groups]
    assert len(groups) == 2 and sum(counts) == plan.keep.sum()
    for name, step in (("w_gate", 1), ("w_up", 1), ("w_down", GROUP)):
        for part, of in (("packed", 1), ("scale", step)):
            parts = [
                np.asarray(getattr(getattr(group.mlp.experts, name), part))[: count // of]
                for group, count in zip(groups, counts, strict=True)
            ]
            theirs = np.asarray(getattr(getattr(layer, name), part))
            np.testing.assert_array_equal(np.concatenate(parts), theirs[: sum(counts) // of])
    for name in ("attention", "mlp.shared"):
        ours, theirs = (attrgetter(name)(one) for one in (groups[0], whole.layer(1)))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
