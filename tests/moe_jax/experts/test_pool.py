"""How a pool's channels are walked."""

import numpy as np
import pytest

from moe_jax.experts.pool import channels_per_step


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
