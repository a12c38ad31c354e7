"""Experts of different widths laid one after the other, by plain concatenation."""

import jax.numpy as jnp
import numpy as np

from moe_jax.config import SWIGLU
from moe_jax.experts.pool import Experts


def pooled_experts(
    gate, up, down, *, width, rows, block, gate_bias=None, up_bias=None, down_bias=None,
    activation=SWIGLU,
) -> Experts:  # fmt: skip
    """Experts from a list of arrays [n_e, D] for each weight, and [n_e] for each bias."""

    def pool(weights):
        whole = np.concatenate(weights)
        return jnp.asarray(np.pad(whole, [(0, rows - len(whole)), *[(0, 0)] * (whole.ndim - 1)]))

    return Experts(
        w_gate=pool(gate),
        w_up=pool(up),
        w_down=pool(down),
        b_gate=None if gate_bias is None else pool(gate_bias),
        b_up=None if up_bias is None else pool(up_bias),
        b_down=down_bias,
        activation=activation,
        count=jnp.asarray([len(weight) for weight in gate], jnp.int32),
        width=width,
        block=block,
    )
