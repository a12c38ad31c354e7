"""Routed experts as a pool of channels, and how one is made of experts of any widths."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moe_jax.config import SWIGLU, Activation
from moe_jax.errors import InputError
from moe_jax.experts.dispatch import Pool
from moe_jax.experts.weights import ExpertWeights
from moe_jax.host_arrays import aligned_empty
from moe_jax.module import module
from moe_jax.quant import Weight, dequantize

STEPS = (128, 64, 32, 16)  # channels that a step of the loop over an expert's channels may take
STEP_COST = 3  # of a step, in channels: measured with 64 to 128 of them, 576 wide, float32


@module
class Experts(nnx.Module):
    """Routed gated experts of one layer as a pool of channels, one row per channel.

    Expert e owns `count[e]` consecutive rows; rows after the last expert's are zero. In the dense
    model every count is F; pruning selects rows; an emptied expert owns none and adds zero, or
    `b_down[e]` if there are biases.
    """

    w_gate: Weight = nnx.data()  # [C, D]
    w_up: Weight = nnx.data()  # [C, D]
    w_down: Weight = nnx.data()  # [C, D], transposed against Hugging Face
    count: Array = nnx.data()  # int32 [E]
    width: int = nnx.static()  # columns of the intermediate rows, at least every count
    block: int = nnx.static()  # channels per step of the matmul loop
    b_gate: Array | None = nnx.data(default=None)  # [C]
    b_up: Array | None = nnx.data(default=None)  # [C]
    b_down: Array | None = nnx.data(default=None)  # [E, D]
    activation: Activation = nnx.static(default=SWIGLU)

    @property
    def weights(self) -> ExpertWeights:
        """The pools as plain arrays."""
        pools = (self.w_gate, self.w_up, self.w_down)
        return ExpertWeights(
            *(dequantize(pool) for pool in pools),
            gate_bias=None if self.b_gate is None else self.b_gate[:, None],
            up_bias=None if self.b_up is None else self.b_up[:, None],
            down_bias=self.b_down,
            activation=self.activation,
        )

    @property
    def pool(self) -> Pool:
        """Where each expert's channels lie."""
        return Pool(
            offset=jnp.cumsum(self.count) - self.count,
            count=self.count,
            width=self.width,
            block=self.block,
        )


def dense_experts(
    w_gate: Weight,
    w_up: Weight,
    w_down: Weight,
    num_experts: int,
    *,
    biased: bool = False,
    activation: Activation = SWIGLU,
) -> Experts:
    """Experts of equal width from pools [E*F, D], w_down transposed to a row per channel.

    `biased` ones have biases, all zero.
    """

    def zeros(*shape: int) -> Array | None:
        return jnp.zeros(shape, w_gate.dtype) if biased else None

    width = w_gate.shape[0] // num_experts
    return Experts(
        w_gate=w_gate,
        w_up=w_up,
        w_down=w_down,
        count=jnp.full(num_experts, width, jnp.int32),
        width=width,
        block=width,
        b_gate=zeros(w_gate.shape[0]),
        b_up=zeros(w_gate.shape[0]),
        b_down=zeros(num_experts, w_gate.shape[1]),
        activation=activation,
    )


def channels_per_step(counts: np.ndarray) -> int:
    """The step that walks the channels of all experts with the least work; the last step of an
    expert is computed whole, whatever is left.

    Args:
      counts: int, channels of every expert of a model, any shape.

    Returns:
      One of `STEPS`, or the widest expert where one step takes it.
    """
    widest = max(1, int(np.max(counts, initial=0)))
    steps = [min(widest, STEPS[0]), *(step for step in STEPS if step < widest)]
    return min(steps, key=lambda step: int((-(-counts // step)).sum()) * (step + STEP_COST))


def kept_experts(
    dense: Experts,
    keep: np.ndarray,
    *,
    width: int,
    rows: int,
    block: int,
    down_bias: Array | None = None,
) -> Experts:
    """Experts with some of their channels.

    Args:
      dense: experts of F channels.
      keep: bool [E, F].
      width: columns of the intermediate rows, a multiple of `block` and at least every count.
      rows: rows of the pool, at least the channels plus one block; give all layers of a model the
        same `width`, `rows` and `block` and they share one compilation.
      block: channels per step of the matmul loop.
      down_bias: [E, D]; an expert has it whatever its width.

    Returns:
      The experts, whose rows are in memory of their own.

    Raises:
      InputError: if the sizes do not fit.
    """
    counts = keep.sum(axis=1)
    _check_sizes(counts.tolist(), width, rows, block)
    index = np.flatnonzero(keep)

    def cut(weight: Weight | None) -> Array | None:
        return None if weight is None else _pool(rows, np.asarray(dequantize(weight)), index)

    names = ("w_gate", "w_up", "w_down", "b_gate", "b_up")
    return dataclasses.replace(
        dense,
        **{name: cut(getattr(dense, name)) for name in names},
        b_down=down_bias,
        count=jnp.asarray(counts, jnp.int32),
        width=width,
        block=block,
    )


def _pool(rows: int, values: np.ndarray, index: np.ndarray) -> Array:
    """Some rows of an array, and zeros up to so many; copied once, for a CPU's device too."""
    pool = aligned_empty((rows, *values.shape[1:]), values.dtype)
    np.take(values, index, axis=0, out=pool[: len(index)], mode="clip")  # "raise" takes a buffer
    pool[len(index) :] = 0
    return jax.device_put(pool, may_alias=True)


def _check_sizes(counts: list[int], width: int, rows: int, block: int) -> None:
    if width % block or width < max(counts) or rows < sum(counts) + block:
        raise InputError(
            f"a pool of rows={rows}, width={width}, block={block} cannot hold experts of widths "
            f"{counts}: width must be a multiple of block and cover the widest expert, rows must "
            f"be at least {sum(counts) + block}"
        )
