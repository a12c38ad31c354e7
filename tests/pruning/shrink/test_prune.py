"""Cutting channels out equals zeroing them."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention.context import make_context
from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.experts.run import gated_experts
from moe_jax.quant import QTensor, dequantize, quantize
from moe_jax.stream import forward_hidden, layer_forward
from moe_jax.transformer import Transformer, init
from pruning.budget.plan import PruningPlan
from pruning.scores.collect import collect_statistics
from pruning.shrink.prune import PrunedSource, mask_layer, output_bias, prune_layer

EXPERTS, CHANNELS = 6, 12
CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    max_position=32,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    moe=MoEConfig(
        num_experts=EXPERTS, experts_per_token=2, d_expert=CHANNELS, renormalize=False, d_shared=8
    ),
    d_dense=20,
    dense_layers=(1,),
)
VALID = np.arange(11)[None] < np.array([[11], [6], [11]])


@pytest.fixture(scope="module")
def model() -> Transformer:
    # Order-one weights, so that a lost channel cannot hide below the tolerance.
    grow = lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf  # noqa: E731
    return jax.tree.map(grow, init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def keep() -> np.ndarray:
    """Two layers of every sort of expert: empty, full, one channel, and ragged."""
    keep = np.random.default_rng(0).random((2, EXPERTS, CHANNELS)) < 0.6
    keep[0, 0], keep[0, 1], keep[1, 5] = False, True, False
    keep[0, 2] = np.arange(CHANNELS) == 7
    return keep


@pytest.fixture(scope="module")
def plan(keep) -> PruningPlan:
    return PruningPlan(keep=keep, layer_indices=(0, 2))


@pytest.fixture(scope="module")
def place():
    """A batch of hidden states and where its tokens stand."""
    x = jax.random.normal(jax.random.key(5), (*VALID.shape, CONFIG.d_model))
    return x, make_context(CONFIG.attention, CONFIG.max_position, jnp.asarray(VALID))


@pytest.mark.parametrize("block", [12, 4, 3])
def test_a_pruned_layer_computes_what_the_masked_layer_does(model, keep, place, block):
    layer = model.layers[0]
    rows = int(keep[0].sum()) + block
    pruned = prune_layer(layer, keep[0], width=12, rows=rows, block=block)
    masked = layer_forward(mask_layer(layer, keep[0]), *place)
    np.testing.assert_allclose(layer_forward(pruned, *place), masked, rtol=1e-5, atol=1e-5)
    assert np.abs(masked - layer_forward(layer, *place)).max() > 0.1  # pruning did something
    np.testing.assert_array_equal(pruned.mlp.experts.count, keep[0].sum(axis=1))
    np.testing.assert_array_equal(pruned.mlp.router, layer.mlp.router)


def test_an_emptied_expert_adds_exactly_nothing(model, keep, place):
    rows = int(keep[0].sum()) + 4
    pruned = prune_layer(model.layers[0], keep[0], width=12, rows=rows, block=4)
    for layer in (pruned, mask_layer(model.layers[0], keep[0])):
        _, trace = layer.trace(*place, gated_experts(lambda hidden, dispatch: hidden))
        owner = np.repeat(trace.dispatch.tile_expert, trace.dispatch.tile)
        real = np.asarray(trace.dispatch.row_copy) < trace.expert.size
        empty = real & (owner == 0)
        assert empty.any()
        np.testing.assert_array_equal(np.asarray(trace.kept.out)[empty], 0)
        others = np.asarray(trace.kept.out)[real & (owner != 0)]
        assert (np.abs(others).max(axis=1) > 0).all()


def test_the_three_matrices_keep_the_same_channels(model, keep):
    """Rows of the pool are the kept rows of each dense expert, in order."""
    layer = model.layers[2]
    rows = int(keep[1].sum()) + 4
    experts = prune_layer(layer, keep[1], width=12, rows=rows, block=4).mlp.experts
    for name in ("w_gate", "w_up", "w_down"):
        dense = np.asarray(getattr(layer.mlp.experts, name))
        expected = [
            dense[e * CHANNELS + f]
            for e in range(EXPERTS)
            for f in range(CHANNELS)
            if keep[1, e, f]
        ]
        pool = np.asarray(getattr(experts, name))
        np.testing.assert_array_equal(pool[: len(expected)], expected)
        np.testing.assert_array_equal(pool[len(expected) :], 0)


def test_quantised_layers_are_pruned_by_value(model, keep, place):
    layer = model.layers[0]
    experts = dataclasses.replace(
        layer.mlp.experts,
        w_up=quantize(layer.mlp.experts.w_up, group_size=8, axis=1, dtype=jnp.float32),
    )
    layer = dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))
    assert isinstance(layer.mlp.experts.w_up, QTensor)
    pruned = prune_layer(layer, keep[0], width=12, rows=int(keep[0].sum()) + 12, block=12)
    expected = np.asarray(dequantize(experts.w_up))[keep[0].ravel()]
    np.testing.assert_array_equal(pruned.mlp.experts.w_up[: len(expected)], expected)


def test_all_pruned_layers_share_shapes_and_one_compilation(model, plan):
    source = PrunedSource(base=model, plan=plan, block=4)
    first, second = source.layer(0), source.layer(2)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert [leaf.shape for leaf in jax.tree.leaves(first)] == [
        leaf.shape for leaf in jax.tree.leaves(second)
    ]
    tokens = np.random.default_rng(2).integers(0, 32, (5, 13)).astype(np.int32)
    before = layer_forward._cache_size()
    forward_hidden(source, tokens, np.ones(tokens.shape, bool), batch=5)
    assert layer_forward._cache_size() - before == 2  # the dense layer and the pruned ones


def test_a_pruned_source_is_the_masked_model(model, plan, keep):
    masked = [
        mask_layer(layer, keep[(0, 2).index(i)]) if i in (0, 2) else layer
        for i, layer in enumerate(model.layers)
    ]
    tokens = np.random.default_rng(3).integers(0, 32, VALID.shape).astype(np.int32)
    whole = dataclasses.replace(model, layers=tuple(masked))
    expected = jax.jit(lambda model, *text: model.hidden(*text)[0])(whole, tokens, VALID)
    source = PrunedSource(base=model, plan=plan)
    got = forward_hidden(source, tokens, VALID, batch=2)
    np.testing.assert_allclose(got[VALID], np.asarray(expected)[VALID], rtol=1e-4, atol=1e-4)
    assert len(source) == 3 and source.config is model.config
    assert source.embedding is model.embedding
    assert source.layer(1) is model.layers[1]


def test_a_source_without_any_channel_still_runs(model, place):
    """Only the shared experts remain."""
    keep = np.zeros((2, EXPERTS, CHANNELS), bool)
    source = PrunedSource(base=model, plan=PruningPlan(keep=keep, layer_indices=(0, 2)))
    masked = layer_forward(mask_layer(model.layers[0], keep[0]), *place)
    np.testing.assert_allclose(layer_forward(source.layer(0), *place), masked, rtol=1e-5, atol=1e-5)


def test_a_plan_of_another_model_is_refused(model):
    other = np.ones((EXPERTS, CHANNELS + 1), bool)
    with pytest.raises(ValueError, match=r"has 72; the plan was made for another model"):
        prune_layer(model.layers[0], other, width=13, rows=91, block=13)
    with pytest.raises(ValueError, match="another model"):
        mask_layer(model.layers[0], other)
    dense = PruningPlan(keep=np.ones((1, EXPERTS, CHANNELS), bool), layer_indices=(1,))
    with pytest.raises(ValueError, match="no experts"):
        PrunedSource(base=model, plan=dense).layer(1)


def test_pools_too_small_for_the_plan_are_refused(model, keep):
    total = int(keep[0].sum())
    for sizes in (
        {"width": 12, "rows": total + 3, "block": 4},
        {"width": 8, "rows": total + 4, "block": 4},
        {"width": 13, "rows": total + 4, "block": 4},
    ):
        with pytest.raises(ValueError, match="cannot hold experts"):
            prune_layer(model.layers[0], keep[0], **sizes)


def test_statistics_of_a_pruned_model_are_refused(model, plan):
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match=r"differ from d_expert=12; score the dense model"):
        collect_statistics(PrunedSource(base=model, plan=plan), tokens, np.ones((1, 4), bool))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_emptied_expert_adds_its_constant_and_others_their_bias(dtype):
    keep = np.array([[True, False], [False, False], [False, True]])
    bias = jnp.arange(12).reshape(3, 4).astype(jnp.float32)
    constants = np.full((3, 4), 100.0, np.float32) + np.arange(4)

    def experts(bias) -> Any:
        return SimpleNamespace(b_down=bias, w_down=jnp.zeros((6, 4), dtype))

    assert output_bias(experts(None), keep, None) is None
    assert output_bias(experts(bias), keep, None) is bias
    own = bias.astype(jnp.float16)  # its own dtype, not that of the weights
    for given, kept in ((own, np.asarray(own)), (None, np.zeros((3, 4)))):
        found = output_bias(experts(given), keep, constants)
        assert found.dtype == (dtype if given is None else jnp.float16)
        wanted = np.where(np.array([[False], [True], [False]]), constants, kept)
        np.testing.assert_array_equal(np.asarray(found, np.float32), wanted)
