"""Products of a linear layer against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.linear import outer


@pytest.mark.parametrize("rows", [24, 64])  # of which only whole 32s lie in two axes
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_outer_products_of_rows_are_summed_without_rounding_them(rows, dtype):
    rng = np.random.default_rng(0)
    left, right = (jnp.asarray(rng.normal(size=(rows, width)), dtype) for width in (5, 3))
    exact = np.asarray(left, np.float64).T @ np.asarray(right, np.float64)
    found = jax.jit(outer)(left, right)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
