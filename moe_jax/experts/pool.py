"""Building a pool of channels out of experts of different widths."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.config import SWIGLU, Activation
from moe_jax.errors import InputError
from moe_jax.experts.moe import Experts


def pooled_experts(
    gate: Sequence[Array | np.ndarray],
    up: Sequence[Array | np.ndarray],
    down: Sequence[Array | np.ndarray],
    *,
    width: int,
    rows: int,
    block: int,
    gate_bias: Sequence[Array | np.ndarray] | None = None,
    up_bias: Sequence[Array | np.ndarray] | None = None,
    down_bias: Array | None = None,
    activation: Activation = SWIGLU,
) -> Experts:
    """Lay experts of different widths one after the other.

    Args:
      gate, up, down: per expert [n_e, D], one row per channel (w_down transposed); n_e may be 0.
      width: columns of the intermediate rows, a multiple of `block` and at least every n_e.
      rows: rows of the pool, at least the channels plus one block; give all layers of a model the
        same `width`, `rows` and `block` and they share one compilation.
      block: channels per step of the matmul loop.
      gate_bias, up_bias: per expert [n_e]; None for none.
      down_bias: [E, D]; an expert has it whatever its width.
      activation: of the channels.

    Returns:
      The experts.

    Raises:
      InputError: if the sizes do not fit.
    """
    counts = [len(weight) for weight in gate]
    if width % block or width < max(counts) or rows < sum(counts) + block:
        raise InputError(
            f"a pool of rows={rows}, width={width}, block={block} cannot hold experts of widths "
            f"{counts}: width must be a multiple of block and cover the widest expert, rows must "
            f"be at least {sum(counts) + block}"
        )

    def pool(weights: Sequence[Array | np.ndarray]) -> Array:
        parts = [np.asarray(weight) for weight in weights]
        fill = np.zeros((rows - sum(counts), *parts[0].shape[1:]), parts[0].dtype)
        return jax.device_put(np.concatenate([*parts, fill]))

    return Experts(
        w_gate=pool(gate),
        w_up=pool(up),
        w_down=pool(down),
        b_gate=None if gate_bias is None else pool(gate_bias),
        b_up=None if up_bias is None else pool(up_bias),
        b_down=down_bias,
        activation=activation,
        count=jnp.asarray(counts, jnp.int32),
        width=width,
        block=block,
    )
