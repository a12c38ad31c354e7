"""Products of routed rows with pools of unequal experts, against loops and a dense einsum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import grouped_matmul as gm

E, D, WIDTH, BLOCK, ROWS, TILE = 4, 6, 8, 4, 10, 4
CAPACITY = E * WIDTH + BLOCK


def layout(widths, routing):
    dispatch = gm.make_dispatch(jnp.asarray(routing, jnp.int32), E, TILE)
    count = jnp.asarray(widths, jnp.int32)
    pool = gm.Pool(offset=jnp.cumsum(count) - count, count=count, width=WIDTH, block=BLOCK)
    return dispatch, pool


def experts(weight, widths) -> list[np.ndarray]:
    ends = np.cumsum(widths)
    return [np.asarray(weight)[end - n : end] for end, n in zip(ends, widths, strict=True)]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(0, WIDTH), min_size=E, max_size=E),
    st.lists(st.integers(0, E), min_size=ROWS, max_size=ROWS),
)
def test_both_forms_equal_a_loop_over_rows(widths, routing):
    dispatch, pool = layout(widths, routing)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, D)).astype(np.float32)
    weight = rng.normal(size=(CAPACITY, D)).astype(np.float32)
    parts = experts(weight, widths)
    rows = gm.gather_rows(jnp.asarray(x), dispatch, 1)
    place = {int(copy): row for row, copy in enumerate(dispatch.row_copy) if copy < ROWS}
    assert set(place) == {i for i, e in enumerate(routing) if e < E}
    for expand, contract in (
        (gm.expand, gm.contract),
        (gm.expand_ragged_dot, gm.contract_ragged_dot),
    ):
        wide = np.asarray(expand(rows, jnp.asarray(weight), dispatch, pool))
        back = np.asarray(contract(jnp.asarray(wide), jnp.asarray(weight), dispatch, pool))
        for copy, row in place.items():
            e = routing[copy]
            expected = parts[e] @ x[copy]
            np.testing.assert_allclose(wide[row, : widths[e]], expected, rtol=1e-4, atol=1e-5)
            assert not wide[row, widths[e] :].any()
            np.testing.assert_allclose(back[row], expected @ parts[e], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", [(8, 8, 8, 8), (5, 0, 8, 3)])
def test_gradients_equal_those_of_a_dense_masked_einsum(widths):
    routing = [0, 3, 2, 2, 4, 1, 0, 0, 2, 3]  # 4 goes nowhere
    dispatch, pool = layout(widths, routing)
    x = jax.random.normal(jax.random.key(0), (ROWS, D))
    weight = jax.random.normal(jax.random.key(1), (CAPACITY, D))
    target = jax.random.normal(jax.random.key(2), (ROWS, D))

    def ours(x, weight):
        rows = gm.gather_rows(x, dispatch, 1)
        hidden = jnp.sin(gm.expand(rows, weight, dispatch, pool))
        out = gm.contract(hidden, weight, dispatch, pool)
        return jnp.sum(out * gm.gather_rows(target, dispatch, 1))

    ends = np.cumsum(widths)
    owner = np.full(CAPACITY, -1)
    for e, (end, n) in enumerate(zip(ends, widths, strict=True)):
        owner[end - n : end] = e
    mask = jnp.asarray(np.asarray(routing)[:, None] == owner[None], jnp.float32)

    def dense(x, weight):
        hidden = jnp.sin(jnp.einsum("rd,cd->rc", x, weight)) * mask
        return jnp.sum(jnp.einsum("rc,cd->rd", hidden, weight) * target)

    for found, expected in zip(
        jax.grad(ours, (0, 1))(x, weight), jax.grad(dense, (0, 1))(x, weight), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_pools_multiply_exactly_as_their_float32_values():
    dispatch, pool = layout((5, 0, 8, 3), [0, 3, 2, 2, 4, 1, 0, 0, 2, 3])
    rows = gm.gather_rows(jax.random.normal(jax.random.key(0), (ROWS, D)), dispatch, 1)
    weight = jax.random.normal(jax.random.key(1), (CAPACITY, D)).astype(jnp.bfloat16)
    narrow = gm.expand(rows, weight, dispatch, pool)
    wide = gm.expand(rows, weight.astype(jnp.float32), dispatch, pool)
    np.testing.assert_allclose(narrow, wide, rtol=1e-6, atol=1e-6)
