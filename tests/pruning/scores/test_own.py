"""A statistic of a user's own is the sum over each expert's tokens, by a loop over them."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.experts.dispatch import make_dispatch, tile_height
from pruning.scores.own import HiddenRows, Statistic, own_sums

EXPERTS, COPIES, F = 3, 10, 4


@pytest.fixture(scope="module")
def routed():
    """Rows in dispatch order, those of no token full of large numbers, and the tokens' own."""
    rng = np.random.default_rng(0)
    owner = rng.integers(0, EXPERTS, COPIES).astype(np.int32)
    dispatch = make_dispatch(jnp.asarray(owner), EXPERTS, tile_height(COPIES, EXPERTS))
    copy = np.asarray(dispatch.row_copy)
    assert (copy >= COPIES).any()
    own = [rng.standard_normal((COPIES, *shape)).astype(np.float32) for shape in ((F,), (), ())]
    rows = [
        jnp.asarray(np.where((copy < COPIES).reshape(-1, *[1] * (v.ndim - 1)),
                             v[np.minimum(copy, COPIES - 1)], np.float32(1e6)))
        for v in own
    ]  # fmt: skip
    return HiddenRows(*rows), dispatch, owner, own


@pytest.mark.slow
def test_sums_are_those_of_a_loop_over_tokens(routed):
    rows, dispatch, owner, (hidden, weight, square) = routed
    given = (
        ("wide", Statistic(lambda r: r.hidden**2 * r.weight[:, None])),
        ("narrow", Statistic(lambda r: r.output_square * r.weight + 1.0, "LE")),
    )
    found = own_sums(given, rows, dispatch, COPIES)
    wide, narrow = np.zeros((EXPERTS, F)), np.zeros(EXPERTS)
    for expert, h, w, s in zip(owner, hidden, weight, square, strict=True):
        wide[expert] += h**2 * w
        narrow[expert] += s * w + 1.0
    assert found.keys() == {"extra.wide", "extra.narrow"}
    np.testing.assert_allclose(found["extra.wide"], wide, rtol=1e-5)
    np.testing.assert_allclose(found["extra.narrow"], narrow, rtol=1e-5)
    assert own_sums((), rows, dispatch, COPIES) == {}


@pytest.mark.parametrize("axes", ["LEF", "LE"])
def test_what_returns_another_shape_or_has_other_axes_is_refused(routed, axes):
    rows, dispatch, *_ = routed
    wrong = rows.weight if axes == "LEF" else rows.hidden
    with pytest.raises(InputError, match=rf"'mine' returns .* expected .* axes '{axes}'"):
        own_sums((("mine", Statistic(lambda _: wrong, axes)),), rows, dispatch, COPIES)
    with pytest.raises(InputError, match="axes='EF' of a statistic must be 'LEF' or 'LE'"):
        Statistic(lambda _: wrong, "EF")
