"""What linear layers are given, against products of rows in numpy, on layers made up beforehand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.attention.context import make_context
from moe_jax.config import AttentionConfig, LatentAttentionConfig, RopeConfig
from moe_jax.stream import layer_attend
from moe_jax.transformer import abstract
from pruning.shrink.moments import (
    attention_groups,
    attention_moments,
    dense_moments,
    expert_moments,
    total,
)
from tests.pruning.scores.test_layer import CONFIG

LATENT = LatentAttentionConfig(
    num_heads=2, query_rank=5, kv_rank=6, plain_dim=4, rope_dim=2, value_dim=3,
    rope=RopeConfig(theta=1e4), bias=True,
)  # fmt: skip
# Heads that are narrower together than the model, so that w_out can be solved for them.
PLAIN = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4)
LAYERS = {"plain": (PLAIN, 0), "latent": (LATENT, 0), "direct": (
    dataclasses.replace(LATENT, query_rank=None, bias=False), 0), "dense": (PLAIN, 1)}  # fmt: skip


def made(name: str):
    """A layer, its input with rows of padding, and which rows are none."""
    attention, index = LAYERS[name]
    config = dataclasses.replace(CONFIG, attention=attention)
    rng = np.random.default_rng(0)

    # Nothing is zero or one by chance: norms and biases are drawn too.
    def drawn(leaf):
        if leaf.dtype == jnp.int32:  # widths of experts
            return jnp.full(leaf.shape, CONFIG.moe.d_expert, jnp.int32)
        return jnp.asarray(rng.normal(0.3, 0.5, leaf.shape), leaf.dtype)

    layer = jax.tree.map(drawn, abstract(config).layers[index])
    x = rng.normal(size=(3, 5, config.d_model)).astype(np.float32)
    valid = np.array([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])
    return layer, x, valid, make_context(attention, 32, valid)


def normed(x, weight, eps) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * np.asarray(weight)


def wide(weight) -> np.ndarray:
    return np.asarray(weight, np.float64)


def close(found, rows) -> None:
    """`found` is the product of the rows with themselves."""
    wanted = rows.T @ rows
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", ["plain", "latent", "direct"])
def test_attention_is_given_the_normed_input_and_its_heads_outputs(name):
    layer, x, valid, context = made(name)
    found = attention_moments(layer, jnp.asarray(x), context)
    a = layer.attention
    assert set(found) == {names[0] for names in attention_groups(a)}
    rows = normed(x, layer.attention_norm, layer.norm_eps)[valid]
    first = "w_q_down" if getattr(a, "w_q_down", None) is not None else "w_q"
    close(found[first], rows)
    added = wide(layer_attend(layer, jnp.asarray(x), context))[valid] - wide(x)[valid]
    if (bias := getattr(a, "b_out", None)) is not None:
        added = added - wide(bias)
    heads = added @ np.linalg.pinv(wide(a.w_out)).T
    assert found["w_out"].shape == (a.w_out.shape[1],) * 2
    np.testing.assert_allclose(found["w_out"], heads.T @ heads, rtol=1e-3, atol=1e-3)
    if hasattr(a, "w_kv_down"):
        bias = 0 if a.b_kv_down is None else wide(a.b_kv_down)
        latent = (rows @ wide(a.w_kv_down).T + bias)[:, : a.config.kv_rank]
        close(found["w_kv_up"], normed(latent, a.kv_norm, a.config.norm_eps))
    if first == "w_q_down":
        bias = 0 if a.b_q_down is None else wide(a.b_q_down)
        narrow = rows @ wide(a.w_q_down).T + bias
        close(found["w_q_up"], normed(narrow, a.q_norm, a.config.norm_eps))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_that_share_an_input_go_together(name):
    layer, *_ = made(name)
    groups = attention_groups(layer.attention)
    if not hasattr(layer.attention, "w_kv_down"):
        assert groups == [("w_q", "w_k", "w_v"), ("w_out",)]
    elif layer.attention.w_q is None:
        assert groups == [("w_q_down", "w_kv_down"), ("w_q_up",), ("w_kv_up",), ("w_out",)]
    else:
        assert groups == [("w_q", "w_kv_down"), ("w_kv_up",), ("w_out",)]


@pytest.mark.parametrize("name", ["plain", "dense"])
def test_networks_are_given_the_rows_of_their_tokens(name):
    layer, y, valid, context = made(name)
    rows = normed(y, layer.mlp_norm, layer.norm_eps)[valid]
    silu = lambda g: g / (1 + np.exp(-g))  # noqa: E731
    mlp = layer.mlp if hasattr(layer.mlp, "w_gate") else layer.mlp.shared.mlp
    found = dense_moments(layer, mlp, jnp.asarray(y), context)
    close(found["w_gate_up"], rows)
    close(found["w_down"], silu(rows @ wide(mlp.w_gate).T) * (rows @ wide(mlp.w_up).T))
    if mlp is layer.mlp:
        return
    width, per_token = CONFIG.moe.d_expert, CONFIG.moe.experts_per_token
    chosen = np.argsort(-(rows @ wide(layer.mlp.router).T), axis=1)[:, :per_token]
    first = 2
    got = expert_moments(layer, jnp.asarray(y), context, jnp.asarray(first, jnp.int32), size=3)
    counts = [(chosen == expert).any(axis=1).sum() for expert in range(first, first + 3)]
    assert list(got["tokens"]) == counts and sum(counts)
    for i, expert in enumerate(range(first, first + 3)):
        mine = rows[(chosen == expert).any(axis=1)]
        own = slice(expert * width, (expert + 1) * width)
        gate, up = (wide(w)[own] for w in (layer.mlp.experts.w_gate, layer.mlp.experts.w_up))
        for name, inputs in (("w_gate_up", mine), ("w_down", silu(mine @ gate.T) * (mine @ up.T))):
            wanted = inputs.T @ inputs
            atol = 1e-5 * np.abs(wanted).max(initial=1)
            np.testing.assert_allclose(got[name][i], wanted, rtol=1e-4, atol=atol)


def test_what_all_batches_give_is_added_up():
    batches = [(np.full((1, 2, 3), value), value) for value in (1.0, 2.0, 4.0)]
    found = total(lambda x, place: {"sum": x.sum(), "place": jnp.asarray(place)}, batches)
    assert (float(found["sum"]), float(found["place"])) == (6 * 7.0, 7.0)
    assert total(lambda x, place: {"sum": x}, []) == {}
