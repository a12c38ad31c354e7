"""Rows that fill their tiles to the last: no padding row hides what is written beside its place."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts.dispatch import (
    gather_rows,
    make_dispatch,
    padded_rows,
    sum_by_expert,
    tile_height,
)
from tests.moe_jax.experts.test_grouped_matmul import (
    COPIES,
    EXPERTS,
    TILE,
    check_against_loops,
    random_case,
)

ROUTINGS = {  # rows of each expert, of 48 in tiles of 16
    "one tile for each of three": (16, 16, 0, 16),
    "all in the last": (0, 0, 0, 48),
    "all in the first": (48, 0, 0, 0),
    "one beyond, one short": (17, 15, 16, 0),
    "full, and the rest nowhere": (16, 0, 16, 0),
}


def owners(rows) -> np.ndarray:
    found = np.repeat(np.arange(EXPERTS + 1), [*rows, COPIES - sum(rows)])
    return np.random.default_rng(3).permutation(found).astype(np.int32)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", [((6, 6, 6, 6), 6, 6), ((0, 7, 4, 3), 8, 4)])
def test_products_and_sums_of_full_tiles_equal_loops(routing, layout):
    owner = owners(ROUTINGS[routing])
    _, values, hidden, weight, pool = random_case(*layout)
    check_against_loops(owner, layout[0], values, hidden, jnp.asarray(weight), pool)
    dispatch = make_dispatch(jnp.asarray(owner), EXPERTS, TILE)
    sums = sum_by_expert(gather_rows(jnp.asarray(values), dispatch, 1), dispatch)
    wanted = [values[owner == e].astype(np.float64).sum(axis=0) for e in range(EXPERTS)]
    np.testing.assert_allclose(sums, wanted, rtol=1e-5, atol=1e-5)
    assert dispatch.num_tiles == sum(-(-rows // TILE) for rows in ROUTINGS[routing])


def test_there_is_room_for_the_worst_routing_and_no_row_more():
    for rows in (48, 256, 4096):
        tile = tile_height(rows, EXPERTS)
        # All experts but one begin a tile with one row, the last has the rest.
        worst = EXPERTS - 1 + -(-(rows - EXPERTS + 1) // tile)
        assert worst * tile <= padded_rows(rows, EXPERTS) <= (worst + 1) * tile
