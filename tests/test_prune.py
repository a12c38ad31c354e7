"""Cutting channels out equals masking them; pruned layers share one compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention import make_context
from moe_jax.stream import forward_hidden, layer_forward
from moe_jax.transformer import init
from pruning.attribution import collect_statistics
from pruning.plan import PruningPlan
from pruning.prune import PrunedSource, mask_layer, prune_layer
from tests.test_attribution import CONFIG


@pytest.fixture(scope="module")
def model():
    model = init(CONFIG, jax.random.key(5))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, model)


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    keep = np.random.default_rng(0).random((2, 6, 12)) < 0.5
    keep[0, 2] = False  # an emptied expert
    keep[1, 3] = True
    return PruningPlan(keep, (0, 2), {})


def test_pruned_layers_equal_masked_ones_and_compile_once(model, plan):
    context = make_context(CONFIG.attention, CONFIG.max_position, jnp.ones((2, 9), bool))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    for block in (5, 128):  # several steps per expert, and one
        source = PrunedSource(model, plan, block=block)
        before = layer_forward._cache_size()
        for slot, index in enumerate(plan.layer_indices):
            pruned = layer_forward(source.layer(index), x, context)
            masked = mask_layer(model.layer(index), plan.keep[slot])(x, context)
            np.testing.assert_allclose(pruned, masked, rtol=1e-5, atol=1e-5)
        assert layer_forward._cache_size() == before + 1


def test_a_streamed_forward_equals_the_whole_model(model):
    tokens = np.random.default_rng(1).integers(0, 64, (5, 9)).astype(np.int32)
    valid = np.arange(9)[None] < np.array([9, 4, 9, 2, 7])[:, None]
    whole, _ = model.hidden(jnp.asarray(tokens), jnp.asarray(valid))
    streamed = forward_hidden(model, tokens, valid, batch=2)
    np.testing.assert_allclose(streamed[valid], np.asarray(whole)[valid], rtol=1e-4, atol=1e-5)


def test_a_plan_of_another_shape_and_a_dense_layer_are_refused(model):
    sizes = {"width": 12, "rows": 80, "block": 4}
    with pytest.raises(ValueError, match="made for another model"):
        prune_layer(model.layer(0), np.ones((6, 11), bool), **sizes)
    with pytest.raises(ValueError, match="no experts"):
        prune_layer(model.layer(1), np.ones((6, 12), bool), **sizes)


def test_statistics_of_a_pruned_model_are_refused(model, plan):
    tokens, valid = np.zeros((1, 4), np.int32), np.ones((1, 4), bool)
    with pytest.raises(ValueError, match="score the dense model"):
        collect_statistics(PrunedSource(model, plan), tokens, valid)
