"""How a pool's channels are walked."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.experts.pool import channels_per_step, dense_experts, kept_experts

KEEP = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)


@pytest.mark.parametrize(
    ("counts", "step"),
    [
        ([768, 768], 128),  # 6 steps of 131 each, in channels; by 64: 12 of 67
        ([96, 96, 0], 96),  # one step each
        ([[128, 128], [64, 64]], 64),  # 6 steps of 67; by 128: 4 of 131; by 32: 12 of 35
        ([[128, 128], [32, 32]], 32),  # 10 of 35; by 64: 6 of 67; by 128: 4 of 131
        ([129, 1], 16),  # 10 of 19; by 32: 6 of 35; by 64: 4 of 67; by 128: 3 of 131
        ([5, 0], 5),
        ([0, 0], 1),
        ([], 1),
    ],
)
def test_experts_are_walked_with_the_least_work(counts, step):
    assert channels_per_step(np.array(counts, int)) == step


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_kept_channels_lie_one_after_the_other_and_zeros_behind(dtype):
    pools = [jnp.asarray(np.arange(1 + k, 61 + k).reshape(12, 5), dtype) for k in range(3)]
    dense = dense_experts(*pools, 3, biased=True)
    bias = jnp.ones((3, 5), dtype)
    found = kept_experts(dense, KEEP, width=4, rows=7, block=2, down_bias=bias)
    for name, pool in zip(("w_gate", "w_up", "w_down"), pools, strict=True):
        rows = [list(np.asarray(pool)[row]) for row in (0, 2, 3, 9)]
        np.testing.assert_array_equal(getattr(found, name), rows + [[0] * 5] * 3)
        assert getattr(found, name).dtype == dtype
        np.testing.assert_array_equal(getattr(dense, name), pool)
    assert found.count.tolist() == [3, 0, 1] and (found.width, found.block) == (4, 2)
    assert found.b_gate.shape == (7,) and found.b_down is bias


@pytest.mark.parametrize(
    "wrong", [{"width": 2}, {"width": 3}, {"rows": 5}], ids=["narrow", "no multiple", "short"]
)
def test_a_pool_that_cannot_hold_them_is_refused(wrong):
    dense = dense_experts(*[jnp.ones((12, 5))] * 3, 3)
    sizes = {"width": 4, "rows": 6, "block": 2}
    kept_experts(dense, KEEP, **sizes)
    with pytest.raises(InputError, match=r"cannot hold experts of widths \[3, 0, 1\]"):
        kept_experts(dense, KEEP, **(sizes | wrong))
