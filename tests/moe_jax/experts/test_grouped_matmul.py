"""Products of rows with their experts against loops in numpy and masked dense products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.experts.dispatch import Pool, gather_rows, make_dispatch
from moe_jax.experts.grouped_matmul import FORMS, contract, expand

COPIES, EXPERTS, TILE, D = 48, 4, 16, 5
RAGGED = (0, 7, 4, 3)
# name: (channels per expert, width, block)
LAYOUTS = {
    "dense": ((6, 6, 6, 6), 6, 6),
    "one block wider than every expert": (RAGGED, 8, 8),
    "blocks narrower than the experts": (RAGGED, 8, 4),
    "one channel per block": (RAGGED, 8, 1),
}
expand_jit, contract_jit, dispatch_jit = (
    jax.jit(expand),
    jax.jit(contract),
    jax.jit(make_dispatch, static_argnums=(1, 2)),
)


def make_pool(counts, width: int, block: int) -> Pool:
    offset = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
    return Pool(
        offset=jnp.asarray(offset),
        count=jnp.asarray(counts, jnp.int32),
        width=width,
        block=block,
    )


def random_case(counts, width, block, *, seed=0, rows=None):
    """Random copies, of which some go nowhere, and a pool whose spare rows are not zero."""
    rng = np.random.default_rng(seed)
    owner = rng.choice(EXPERTS + 1, COPIES, p=[0.1, 0.5, 0.1, 0.1, 0.2]).astype(np.int32)
    values = rng.normal(size=(COPIES, D)).astype(np.float32)
    hidden = rng.normal(size=(COPIES, width)).astype(np.float32)
    spare = 0 if width == block == max(counts) else block
    weight = rng.normal(size=(rows or sum(counts) + spare, D)).astype(np.float32)
    return owner, values, hidden, weight, make_pool(counts, width, block)


def selection(owner, counts, width: int, rows: int) -> np.ndarray:
    """S[r, f, c] = 1 where channel f of copy r's expert is row c of the pool."""
    first = [sum(counts[:e]) for e in range(EXPERTS)]
    chosen = np.zeros((COPIES, width, rows), np.float32)
    for r, e in enumerate(owner):
        for f in range(counts[e] if e < EXPERTS else 0):
            chosen[r, f, first[e] + f] = 1
    return chosen


def by_copy(rows, dispatch) -> np.ndarray:
    """Rows in dispatch order -> rows in copy order; copies that go nowhere are zero."""
    rows, copy = np.asarray(rows), np.asarray(dispatch.row_copy)
    out = np.zeros((COPIES, rows.shape[1]), rows.dtype)
    out[copy[copy < COPIES]] = rows[copy < COPIES]
    np.testing.assert_array_equal(rows[copy == COPIES], 0)  # padding rows stay zero
    return out


def check_against_loops(owner, counts, values, hidden, weight, pool):
    dispatch = dispatch_jit(jnp.asarray(owner), EXPERTS, TILE)
    first = np.concatenate([[0], np.cumsum(counts)])
    wide = np.zeros((COPIES, pool.width))
    narrow = np.zeros((COPIES, D))
    exact = np.asarray(weight, np.float64)
    for r, e in enumerate(owner):
        if e < EXPERTS:
            for f, channel in enumerate(exact[first[e] : first[e] + counts[e]]):
                wide[r, f] = values[r].astype(np.float64) @ channel
                narrow[r] += hidden[r, f] * channel
    got = expand_jit(gather_rows(jnp.asarray(values), dispatch, 1), weight, dispatch, pool)
    np.testing.assert_allclose(by_copy(got, dispatch), wide, rtol=1e-5, atol=1e-5)
    got = contract_jit(gather_rows(jnp.asarray(hidden), dispatch, 1), weight, dispatch, pool)
    np.testing.assert_allclose(by_copy(got, dispatch), narrow, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_equal_loops_over_copies_and_channels(layout, dtype):
    owner, values, hidden, weight, pool = random_case(*layout)
    check_against_loops(owner, layout[0], values, hidden, jnp.asarray(weight).astype(dtype), pool)


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 8), min_size=EXPERTS, max_size=EXPERTS),
    owner=st.lists(st.integers(0, EXPERTS), min_size=COPIES, max_size=COPIES),
)
def test_any_widths_and_any_routing_equal_the_loops(counts, owner):
    _, values, hidden, weight, pool = random_case(counts, 8, 4, rows=8 * EXPERTS + 4)
    owner = np.asarray(owner, np.int32)
    check_against_loops(owner, counts, values, hidden, jnp.asarray(weight), pool)


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, EXPERTS), min_size=COPIES, max_size=COPIES))
def test_every_copy_gets_one_row_in_a_tile_of_its_expert(owner):
    dispatch = dispatch_jit(jnp.asarray(owner, jnp.int32), EXPERTS, TILE)
    tiles = np.asarray(dispatch.row_copy).reshape(-1, TILE)
    seen = {e: [] for e in range(EXPERTS)}
    for tile, expert in zip(tiles, np.asarray(dispatch.tile_expert), strict=True):
        copies = [int(c) for c in tile if c < COPIES]
        assert all(owner[c] == expert for c in copies)
        seen[int(expert)] += copies
    for expert, copies in seen.items():
        assert copies == [c for c, e in enumerate(owner) if e == expert]
        assert dispatch.tokens[expert] == len(copies)
    used = sum(-(-len(copies) // TILE) for copies in seen.values())
    assert dispatch.num_tiles == used
    assert (tiles[used:] == COPIES).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_a_gated_expert_equal_those_of_masked_dense_products(layout):
    owner, values, _, weight, pool = random_case(*layout)
    chosen = jnp.asarray(selection(owner, layout[0], layout[1], len(weight)))
    dispatch = dispatch_jit(jnp.asarray(owner), EXPERTS, TILE)
    rng = np.random.default_rng(1)
    weights = tuple(jnp.asarray(rng.normal(size=weight.shape).astype(np.float32)) for _ in range(3))
    probe = jnp.asarray(rng.normal(size=(COPIES, D)).astype(np.float32))

    def loss(x, weights):
        gate, up, down = weights
        rows = gather_rows(x, dispatch, 1)
        hidden = jax.nn.silu(expand(rows, gate, dispatch, pool))
        hidden = hidden * expand(rows, up, dispatch, pool)
        out = contract(hidden, down, dispatch, pool)
        return jnp.sum(out * gather_rows(probe, dispatch, 1))

    def dense_loss(x, weights):
        gate, up, down = weights
        wide = lambda w: jnp.einsum("rfc,cd,rd->rf", chosen, w, x)  # noqa: E731
        out = jnp.einsum("rfc,cd,rf->rd", chosen, down, jax.nn.silu(wide(gate)) * wide(up))
        return jnp.sum(out * probe)

    got = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(jnp.asarray(values), weights)
    expected = jax.jit(jax.value_and_grad(dense_loss, argnums=(0, 1)))(jnp.asarray(values), weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("form", ["kernels", "ragged_dot"])
@pytest.mark.parametrize("of_rows", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("of_weights", [jnp.float32, jnp.bfloat16])
def test_every_form_equals_the_loops_over_tiles(layout, form, of_rows, of_weights):
    owner, values, hidden, weight, pool = random_case(*layout)
    dispatch = dispatch_jit(jnp.asarray(owner), EXPERTS, TILE)
    copies = (values, hidden)
    x, h = (gather_rows(jnp.asarray(rows), dispatch, 1).astype(of_rows) for rows in copies)
    pairs = zip(FORMS[form](), FORMS["tiles"](), strict=True)
    for arguments, (product, tiles) in zip(((x,), (h,), (h, x)), pairs, strict=True):
        arguments = (*arguments, jnp.asarray(weight).astype(of_weights), dispatch, pool)
        got, expected = (np.asarray(jax.jit(f)(*arguments), np.float32) for f in (product, tiles))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tile", [16, 128])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kernels_of_many_blocks_steps_and_tiles_equal_numpy(tile, dtype):
    rng, counts, width, depth, copies = np.random.default_rng(3), (150, 0, 131, 40), 160, 200, 700
    owner = rng.choice(EXPERTS + 1, copies, p=[0.6, 0.1, 0.2, 0.05, 0.05]).astype(np.int32)
    dispatch = dispatch_jit(jnp.asarray(owner), EXPERTS, tile)
    pool = make_pool(counts, width, width)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)  # noqa: E731
    x, h, weight = draw(copies, depth), draw(copies, width), draw(sum(counts) + width, depth)
    rows_x, rows_h = (gather_rows(value, dispatch, 1) for value in (x, h))
    products = FORMS["kernels"]()
    found = [
        np.asarray(jax.jit(product)(*arguments, weight, dispatch, pool), np.float64)
        for product, arguments in zip(
            products, ((rows_x,), (rows_h,), (rows_h, rows_x)), strict=True
        )
    ]
    wide, exact = np.asarray(weight, np.float64), [np.zeros(value.shape) for value in found]
    copy = np.asarray(dispatch.row_copy)
    for expert, count in enumerate(counts):
        first = sum(counts[:expert])
        own = np.flatnonzero((copy < copies) & (np.append(owner, -1)[copy] == expert))
        left, right = (np.asarray(rows[own], np.float64) for rows in (rows_h[:, :count], rows_x))
        channels = wide[first : first + count]
        exact[0][own, :count] = right @ channels.T
        exact[1][own] = left @ channels
        exact[2][first : first + count] = left.T @ right
    # float32 sums of some hundred products, rounded once more to bfloat16
    error = 2e-6 if dtype == jnp.float32 else 2**-8
    for got, wanted in zip(found, exact, strict=True):
        assert np.abs(got - wanted).max() <= error * np.abs(wanted).max()


def test_copies_that_go_nowhere_are_never_read():
    owner, values, hidden, weight, pool = random_case(RAGGED, 8, 4)
    nowhere = owner == EXPERTS
    assert nowhere.any()
    dispatch = dispatch_jit(jnp.asarray(owner), EXPERTS, TILE)
    for rows, product in ((values, expand_jit), (hidden, contract_jit)):
        poisoned = np.where(nowhere[:, None], np.float32(np.nan), rows)
        results = [
            product(gather_rows(jnp.asarray(x), dispatch, 1), jnp.asarray(weight), dispatch, pool)
            for x in (rows, poisoned)
        ]
        np.testing.assert_array_equal(*results)
    idle = dispatch_jit(jnp.full(COPIES, EXPERTS, jnp.int32), EXPERTS, TILE)
    x = gather_rows(jnp.asarray(values), idle, 1)
    assert idle.num_tiles == 0
    np.testing.assert_array_equal(expand_jit(x, jnp.asarray(weight), idle, pool), 0)
