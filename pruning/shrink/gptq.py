"""GPTQ of one decoder layer from the inputs it sees in a model.

Attention is quantised first; then the feed-forward part, from the inputs it has behind the
quantised attention. Routed experts see the rows they are routed, without the routing weight: it
scales a row's error and its output alike.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dense import DenseMLP, SharedExpert
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.quant import QTensor, Weight, dequantize, pack_nibbles, unpack_nibbles
from moe_jax.quantized import quantize_layer
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import layer_attend
from moe_jax.transformer import DecoderLayer
from pruning.shrink.gptq_core import Coded, gptq
from pruning.shrink.moments import (
    AnyAttention,
    Batch,
    Moments,
    attention_groups,
    attention_moments,
    dense_moments,
    expert_moments,
    total,
)

MOMENT_BYTES = 1 << 30  # second moments of experts held at a time


@dataclass(frozen=True)
class Solved:
    """How many matrices a layer has in 4 bits, and how many of them GPTQ could not do.

    A matrix falls back to rounding to nearest when fewer rows than it has inputs reached it, for
    then its second moments are singular, or when they cannot be factored even so.
    """

    matrices: int
    fallbacks: int


def gptq_layer(
    layer: DecoderLayer,
    batches: Sequence[Batch],
    group_size: int,
    moment_bytes: int = MOMENT_BYTES,
    spread: Spread = ALONE,
) -> tuple[DecoderLayer, Solved]:
    """Quantise a layer's linear weights in the metric of their inputs.

    Args:
      layer: with 16- or 32-bit weights; expert widths are multiples of the group size.
      batches: inputs of the layer, those of this process.
      group_size: weights per scale, along the input of each linear layer.
      moment_bytes: second moments of routed experts to hold at a time; each further part costs
        another forward pass.
      spread: the processes that share the text; all call alike and solve alike.

    Returns:
      (the layer with `QTensor` weights and float32 scales, what was done).
    """
    rounded = quantize_layer(layer, group_size)
    seen = Seen(batches, spread)
    attention, failed = quantised_attention(layer, rounded.attention, seen, group_size)
    half = dataclasses.replace(layer, attention=attention)
    behind = [(np.asarray(layer_attend(half, jnp.asarray(x), c)), c) for x, c in batches]
    middle = Seen(behind, spread)
    if isinstance(layer.mlp, MoE):
        assert isinstance(rounded.mlp, MoE)
        experts, of_experts = quantised_experts(
            layer, rounded.mlp.experts, middle, group_size, moment_bytes
        )
        shared, missed = quantised_shared(layer, rounded.mlp.shared, middle, group_size)
        mlp = dataclasses.replace(rounded.mlp, experts=experts, shared=shared)
        matrices = of_experts.matrices + (0 if shared is None else 3)
        failed += of_experts.fallbacks + missed
    else:
        assert isinstance(rounded.mlp, DenseMLP)
        mlp, missed = _dense(layer, layer.mlp, rounded.mlp, middle, group_size)
        matrices, failed = 3, failed + missed
    quantised = dataclasses.replace(rounded, attention=attention, mlp=mlp)
    matrices += attention_matrices(layer)
    return quantised, Solved(matrices=matrices, fallbacks=failed)


def attention_matrices(layer: DecoderLayer) -> int:
    """How many matrices of its attention are quantised."""
    return sum(map(len, attention_groups(layer.attention)))


@dataclass(frozen=True)
class Seen:
    """Inputs of a part of a layer, of which this process has some batches."""

    batches: Sequence[Batch]
    spread: Spread

    @cached_property
    def tokens(self) -> int:
        """Valid tokens of all processes."""
        own = sum(int(np.asarray(context.valid).sum()) for _, context in self.batches)
        return int(self.spread.total({"tokens": np.array(float(own))})["tokens"])

    def total(self, measure: Callable[[Array, Context], Moments]) -> Moments:
        """Sum of what `measure` finds on every batch of all processes."""
        return total(measure, self.batches, self.spread)


def quantised_attention(
    layer: DecoderLayer, rounded: AnyAttention, seen: Seen, group: int
) -> tuple[AnyAttention, int]:
    """A layer's attention in 4 bits, and how many of its matrices fell back to `rounded`."""
    moments = seen.total(partial(attention_moments, layer))
    failed = 0
    for names in attention_groups(layer.attention):
        weights = [getattr(layer.attention, name) for name in names]
        solved = _solve(weights, moments[names[0]], seen.tokens, group)
        rounded, missed = _with_solved(rounded, names, solved)
        failed += missed
    return rounded, failed


def _dense(
    layer: DecoderLayer,
    mlp: DenseMLP,
    rounded: DenseMLP,
    seen: Seen,
    group_size: int,
) -> tuple[DenseMLP, int]:
    moments = seen.total(partial(dense_moments, layer, mlp))
    solved = _solve([mlp.w_gate, mlp.w_up], moments["w_gate_up"], seen.tokens, group_size)
    solved += _solve([mlp.w_down], moments["w_down"], seen.tokens, group_size)
    return _with_solved(rounded, ("w_gate", "w_up", "w_down"), solved)


def quantised_shared(
    layer: DecoderLayer,
    rounded: SharedExpert | None,
    seen: Seen,
    group_size: int,
) -> tuple[SharedExpert | None, int]:
    """A layer's shared expert in 4 bits, if it has one, and how many of its matrices fell back;
    `seen` is behind the quantised attention."""
    assert isinstance(layer.mlp, MoE)
    if rounded is None or layer.mlp.shared is None:
        return None, 0
    mlp, failed = _dense(layer, layer.mlp.shared.mlp, rounded.mlp, seen, group_size)
    return dataclasses.replace(rounded, mlp=mlp), failed


def _solve(
    weights: Sequence[Weight], moments: Array, rows: int, group_size: int
) -> list[QTensor | None]:
    """GPTQ of weights [out, in] that share their inputs; None where rounding must do."""
    if rows < weights[0].shape[1]:
        return [None] * len(weights)
    stacked = jnp.concatenate([dequantize(w).astype(jnp.float32) for w in weights])
    found = gptq(stacked, moments, group_size=group_size)
    if not bool(found.solved):
        return [None] * len(weights)
    stops = np.cumsum([w.shape[0] for w in weights])[:-1]
    parts = zip(jnp.split(found.codes, stops), jnp.split(found.scale, stops), strict=True)
    return [QTensor(pack_nibbles(codes), scale, group_size, 1) for codes, scale in parts]


def _with_solved(rounded, names: tuple[str, ...], solved: Sequence[QTensor | None]):
    """`rounded` with the solved weights in place, and how many there were not."""
    changes = {name: q for name, q in zip(names, solved, strict=True) if q is not None}
    return dataclasses.replace(rounded, **changes), len(names) - len(changes)


@partial(jax.jit, static_argnames=("size", "group_size"))
def _solve_experts(
    experts: Experts, moments: Moments, first: Array, *, size: int, group_size: int
) -> tuple[Coded, Coded]:
    """GPTQ of `size` experts, one after the other, every one padded to the pool's width.

    `lax.map` and not `vmap`, which is several times slower on CPU. Returns gate above up
    [size, 2 * width, D] and down transposed as in the pool [size, width, D].
    """
    width, pool = experts.width, experts.pool

    def one(inputs: tuple[Array, Array, Array]) -> tuple[Coded, Coded]:
        expert, gate_up_moments, down_moments = inputs
        channel = pool.offset[expert] + jnp.arange(width)
        own = (jnp.arange(width) < pool.count[expert])[:, None]

        def cut(weight: Weight) -> Array:  # [C, D] -> [width, D]
            rows = dequantize(weight).at[channel].get(mode="fill", fill_value=0)
            return jnp.where(own, rows.astype(jnp.float32), 0)

        pair = jnp.concatenate([cut(experts.w_gate), cut(experts.w_up)])
        down = gptq(cut(experts.w_down).T, down_moments, group_size=group_size)
        flipped = Coded(codes=down.codes.T, scale=down.scale.T, solved=down.solved)
        return gptq(pair, gate_up_moments, group_size=group_size), flipped

    return jax.lax.map(one, (first + jnp.arange(size), moments["w_gate_up"], moments["w_down"]))


def quantised_experts(
    layer: DecoderLayer,
    rounded: Experts,
    seen: Seen,
    group_size: int,
    moment_bytes: int,
) -> tuple[Experts, Solved]:
    """Routed experts of a layer, or a group of it, in 4 bits, some at a time; `seen` is behind the
    quantised attention."""
    moe = layer.mlp
    assert isinstance(moe, MoE)
    number, d_model = len(moe.experts.count), layer.mlp_norm.shape[0]
    fitting = max(1, moment_bytes // moments_of_expert(d_model, moe.experts.width))
    size = max(n for n in range(1, number + 1) if number % n == 0 and n <= fitting)
    pool = _OpenPool(rounded, group_size)
    failed = 0
    for first in range(0, number, size):
        at = jnp.asarray(first, jnp.int32)
        moments = seen.total(partial(expert_moments, layer, first=at, size=size))
        tokens = np.asarray(moments["tokens"])
        solved = jax.device_get(
            _solve_experts(moe.experts, moments, at, size=size, group_size=group_size)
        )
        for i in range(size):
            gate_up, down = jax.tree.map(lambda leaf, i=i: leaf[i], solved)
            failed += pool.put(first + i, gate_up, down, int(tokens[i]))
    kept = int(np.count_nonzero(np.asarray(rounded.count)))
    return pool.closed(), Solved(matrices=3 * kept, fallbacks=failed)


def moments_of_expert(d_model: int, width: int) -> int:
    """Bytes of an expert's second moments: the sum, a batch's, and their total, in float32."""
    return 3 * 4 * (d_model**2 + width**2)


class _OpenPool:
    """The rounded experts of a layer, unpacked, into which solved experts are written."""

    def __init__(self, rounded: Experts, group_size: int):
        self._experts = rounded
        self._group = group_size
        self._count = np.asarray(rounded.count)
        self._start = np.asarray(rounded.pool.offset)
        self._codes, self._scale = {}, {}
        for name in ("w_gate", "w_up", "w_down"):
            tensor = getattr(rounded, name)
            self._codes[name] = unpack_nibbles(np.asarray(tensor.packed))
            self._scale[name] = np.array(tensor.scale)

    def put(self, expert: int, gate_up: Coded, down: Coded, tokens: int) -> int:
        """Write one expert where GPTQ could do it; returns how many of its matrices could not."""
        start, count, width = int(self._start[expert]), int(self._count[expert]), len(down.codes)
        if not count:
            return 0
        rows, failed = slice(start, start + count), 0
        if tokens >= gate_up.codes.shape[1] and gate_up.solved:
            for name, first in (("w_gate", 0), ("w_up", width)):
                self._codes[name][rows] = gate_up.codes[first : first + count]
                self._scale[name][rows] = gate_up.scale[first : first + count]
        else:
            failed += 2
        if tokens >= count and down.solved:
            g = self._group
            self._codes["w_down"][rows] = down.codes[:count]
            self._scale["w_down"][start // g : (start + count) // g] = down.scale[: count // g]
        else:
            failed += 1
        return failed

    def closed(self) -> Experts:
        """The experts with packed weights."""
        packed = {
            name: QTensor(
                packed=jnp.asarray(pack_nibbles(self._codes[name])),
                scale=jnp.asarray(self._scale[name]),
                group_size=self._group,
                axis=getattr(self._experts, name).axis,
            )
            for name in self._codes
        }
        return dataclasses.replace(self._experts, **packed)
