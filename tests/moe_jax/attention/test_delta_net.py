"""The gated delta rule against a loop over tokens and against torch, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_next import modeling_qwen3_next as theirs

from convert import load_model
from moe_jax.attention.context import make_context
from moe_jax.attention.delta_net import init_linear_cache
from moe_jax.attention.delta_rule import CHUNK, gated_delta_rule
from tests.support import tiny

LENGTHS = (1, CHUNK - 1, CHUNK, 2 * CHUNK + 5)
KEYS, SHARED, WIDTH, VALUE = 2, 3, 8, 5
NAMES = ("query", "key", "value", "log_decay", "strength", "state")

rule = jax.jit(gated_delta_rule)


def inputs(length: int, seed: int, decay: float = 1.0) -> dict[str, np.ndarray]:
    """Random inputs of the rule, queries and keys of length one, mean log decay -`decay`."""
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(2, length, KEYS, WIDTH)) for _ in range(2))
    lead = (2, length, KEYS, SHARED)
    values = (
        q / np.linalg.norm(q, axis=-1, keepdims=True),
        k / np.linalg.norm(k, axis=-1, keepdims=True),
        rng.normal(size=(*lead, VALUE)),
        -decay * rng.exponential(size=lead),
        rng.uniform(size=lead),
        rng.normal(size=(2, KEYS, SHARED, WIDTH, VALUE)),
    )
    return {name: v.astype(np.float32) for name, v in zip(NAMES, values, strict=True)}


def loop_over_tokens(query, key, value, log_decay, strength, state):
    """The definition, one sequence, head and token after the other, in float64."""
    state, out = state.astype(np.float64), np.zeros(value.shape)
    for b, k, r in np.ndindex(value.shape[0], KEYS, SHARED):
        held = state[b, k, r]
        for t in range(value.shape[1]):
            held *= np.exp(np.float64(log_decay[b, t, k, r]))
            missing = value[b, t, k, r] - key[b, t, k] @ held
            held += strength[b, t, k, r] * np.outer(key[b, t, k], missing)
            out[b, t, k, r] = query[b, t, k] @ held
    return out, state


@pytest.mark.parametrize("length", LENGTHS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), decay=st.sampled_from([0.0, 1e-3, 1.0, 30.0]))
def test_chunks_are_the_loop_over_tokens(length, seed, decay):
    given = inputs(length, seed, decay)
    found, wanted = rule(**given), loop_over_tokens(**given)
    for ours, exact in zip(found, wanted, strict=True):
        # float32 against float64; without decay a state sums all of the text
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=3e-5 * np.abs(exact).max())


def test_one_key_repeated_and_never_forgotten_stays_exact():
    """The system of a chunk is then all ones, of whose powers the entries are binomials."""
    given = inputs(2 * CHUNK, seed=1)
    given["key"][:] = given["key"][:1, :1, :1]
    given["log_decay"][:], given["strength"][:] = 0, 1
    for ours, exact in zip(rule(**given), loop_over_tokens(**given), strict=True):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-5)


def torch_rule(function, tensors):
    """A rule of transformers on our layout of heads: [value, then state]."""
    query, key, value, log_decay, strength, state = tensors
    flat = lambda x: x.flatten(2, 3)  # noqa: E731
    out, last = function(
        query * WIDTH**0.5,  # which theirs divides by
        key,
        flat(value),
        g=flat(log_decay),
        beta=flat(strength),
        initial_state=state.flatten(1, 2),
        output_final_state=True,
    )
    return out.unflatten(2, (KEYS, SHARED)), last.unflatten(1, (KEYS, SHARED))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "function", ["torch_recurrent_gated_delta_rule", "torch_chunk_gated_delta_rule"]
)
def test_values_and_gradients_of_every_input_equal_torch(function, length):
    given = inputs(length, seed=7, decay=0.3)
    tensors = [torch.from_numpy(given[name]).requires_grad_() for name in NAMES]
    wanted = torch_rule(getattr(theirs, function), tensors)
    rng = np.random.default_rng(8)
    seeds = [rng.normal(size=value.shape).astype(np.float32) for value in wanted]
    found, pull = jax.vjp(gated_delta_rule, *(jnp.asarray(given[name]) for name in NAMES))
    for ours, exact in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, exact.detach(), rtol=1e-4, atol=2e-5)
    sum((v * torch.from_numpy(s)).sum() for v, s in zip(wanted, seeds, strict=True)).backward()
    for name, ours, tensor in zip(
        NAMES, pull(tuple(map(jnp.asarray, seeds))), tensors, strict=True
    ):
        exact = tensor.grad.numpy()
        atol = 5e-5 * np.abs(exact).max()
        np.testing.assert_allclose(ours, exact, rtol=1e-3, atol=atol, err_msg=name)


@pytest.mark.parametrize("cut", [1, CHUNK, CHUNK + 3])
def test_a_text_in_two_parts_is_the_text_in_one(cut):
    given = inputs(2 * CHUNK, seed=3)
    state = given.pop("state")
    first = rule(**{name: v[:, :cut] for name, v in given.items()}, state=state)
    second = rule(**{name: v[:, cut:] for name, v in given.items()}, state=first[1])
    out, last = rule(**given, state=state)
    np.testing.assert_allclose(
        np.concatenate([first[0], second[0]], axis=1), out, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(second[1], last, rtol=1e-4, atol=1e-5)


def test_tokens_that_forget_all_cost_neither_digits_nor_finite_gradients():
    given = inputs(CHUNK, seed=5)
    given["log_decay"][:, 10::7] = -1e4
    out, state = rule(**given)
    wanted, last = loop_over_tokens(**given)
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda given: jnp.sum(jnp.square(gated_delta_rule(**given)[0])))(given)
    assert all(np.isfinite(value).all() for value in gradient.values())


# --- the whole layer ---


@pytest.fixture(scope="module")
def layers(tmp_path_factory):
    """Our linear attention and that of transformers, of one model."""
    model = tiny.tiny_model("qwen3_next")
    ours = load_model(tiny.save(model, tmp_path_factory.mktemp("next") / "model"))
    return ours.layers[0].attention, model.model.layers[0].linear_attn, ours.config


LEFT = np.arange(80) >= np.array([0, 9, 70])[:, None]


@pytest.mark.parametrize("valid", [LEFT, LEFT[:, ::-1]], ids=["left", "right"])
def test_a_layer_and_its_gradient_equal_torch_with_padding_on_either_side(layers, valid):
    ours, torch_layer, config = layers
    rng = np.random.default_rng(0)
    x, seed = (rng.normal(size=(3, 80, 32)).astype(np.float32) for _ in range(2))
    seed *= valid[..., None]
    tensor = torch.from_numpy(x).requires_grad_()
    mask = torch.from_numpy(np.ascontiguousarray(valid)).long()
    wanted = torch_layer(tensor, attention_mask=mask)
    (wanted * torch.from_numpy(seed)).sum().backward()
    context = make_context(config.attention, config.max_position, jnp.asarray(valid))
    found, pull = jax.vjp(lambda x: ours(x, context)[0], jnp.asarray(x))
    np.testing.assert_allclose(
        np.asarray(found)[valid], wanted.detach().numpy()[valid], rtol=1e-4, atol=1e-5
    )
    (gradient,) = pull(jnp.asarray(seed))
    assert not np.asarray(gradient)[~valid].any()
    np.testing.assert_allclose(gradient, tensor.grad, rtol=1e-3, atol=1e-4)


def test_what_stands_in_padding_changes_nothing_not_even_the_state(layers):
    ours, _, config = layers
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 80, 32)).astype(np.float32)
    other = np.where(LEFT[..., None], x, rng.normal(size=x.shape)).astype(np.float32)
    context = make_context(config.attention, config.max_position, jnp.asarray(LEFT))
    cache = init_linear_cache(config.linear_attention, 3, jnp.float32)
    results = [ours(jnp.asarray(value), context, cache) for value in (x, other)]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_array_equal(a, b)
    # and the text alone, without its padding, ends in the same state
    short = jnp.asarray(x[1:2, 9:])
    place = make_context(config.attention, config.max_position, jnp.ones(short.shape[:2], bool))
    alone, end = ours(short, place, init_linear_cache(config.linear_attention, 1, jnp.float32))
    np.testing.assert_allclose(alone[0], results[0][0][1, 9:], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end.state[0], results[0][1].state[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(end.window[0], results[0][1].window[1], rtol=1e-4, atol=1e-6)
