"""What is trained: changes of a student's weights as a pytree, merged into it inside each step.

A student's channels are those that a plan kept, so adapters cannot bring others back. All changes
are zero at first, bit for bit: of two factors of low rank one is. Of the outermost keys `router`,
`experts` and `attention` each has a learning rate of its own; below them stand the layers.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.quant import QTensor, dequantize, is_linear, quantize
from moe_jax.quantized import quantize_layer
from moe_jax.structure import named_leaves
from moe_jax.transformer import DecoderLayer

Trained = Literal["router", "lora", "dora", "full"]
Deltas = dict[str, dict[str, Any]]
EXPERT_WEIGHTS = ("w_gate", "w_up", "w_down")
EXPERT_BIASES = ("b_gate", "b_up", "b_down")
TINY = 1e-30  # below the square of any weight: the norm of a row of zeros has a gradient, zero


@dataclass(frozen=True)
class DeltaConfig:
    """Which weights may change, and how.

    Attributes:
      train: "router" alone; "lora", adapters of the routed experts besides; "dora", adapters whose
        rows have a trained length of their own; "full", every weight of the routed experts.
      rank, alpha: of the experts' adapters, whose product counts alpha / rank.
      router_rank, router_alpha: of the router's; rank 0 trains its whole matrix.
      attention_rank: of adapters of attention, with the experts' ratio; 0 for none. They have
        lengths of their own too unless the experts' are "lora".
      fixed_norm: take the norm of a changed row for a constant in gradients, which is cheaper.
      group_size: weights per 4-bit scale where the forward pass rounds; None for no rounding.
    """

    train: Trained = "dora"
    rank: int = 32
    alpha: float = 128.0
    router_rank: int = 4
    router_alpha: float = 16.0
    attention_rank: int = 0
    fixed_norm: bool = False
    group_size: int | None = None


def init_deltas(layer: DecoderLayer, config: DeltaConfig, key: Array) -> dict[str, Any]:
    """Changes of one layer that change nothing yet, float32, by group; {} where none is trained."""
    keys = jax.random.split(key, 8)
    found: dict[str, Any] = {}
    if isinstance(layer.mlp, MoE):
        router = layer.mlp.router
        rank = min(config.router_rank, *router.shape)
        found["router"] = _factors(router, rank, keys[0]) if rank else jnp.zeros(router.shape)
        if config.train != "router":
            found["experts"] = _expert_deltas(layer.mlp.experts, config, keys[1])
    if config.attention_rank:
        weights = _attention_weights(layer)
        each = zip(weights.items(), jax.random.split(keys[2], len(weights) or 1), strict=False)
        found["attention"] = {
            name: _factors(weight, config.attention_rank, own)
            | ({} if config.train == "lora" else {"magnitude": jnp.zeros(weight.shape[0])})
            for (name, weight), own in each
        }
    return found


def merged(layer: DecoderLayer, deltas: dict[str, Any], config: DeltaConfig) -> DecoderLayer:
    """A layer with its changes, its changed weights in float32.

    Args:
      layer: of the student.
      deltas: of this layer, from `init_deltas` or trained.
      config: as there.
    """
    mlp = layer.mlp
    if "attention" in deltas:
        weights, ratio = _attention_weights(layer), config.alpha / config.rank
        changed = {
            name: _dora(weights[name], _product(one, ratio), one.get("magnitude"), config)
            for name, one in deltas["attention"].items()
        }
        attention = dataclasses.replace(layer.attention, **changed)
        layer = dataclasses.replace(layer, attention=attention)
    if not isinstance(mlp, MoE):
        return layer
    router = mlp.router.astype(jnp.float32)
    change = deltas["router"]
    if isinstance(change, dict):
        change = _product(change, config.router_alpha / min(config.router_rank, *router.shape))
    mlp = dataclasses.replace(mlp, router=router + change)
    if "experts" in deltas:
        changed = _merged_experts(mlp.experts, deltas["experts"], config)
        mlp = dataclasses.replace(mlp, experts=dataclasses.replace(mlp.experts, **changed))
    return dataclasses.replace(layer, mlp=mlp)


def rounded(layer: DecoderLayer, deltas: dict[str, Any], group_size: int) -> DecoderLayer:
    """A layer whose linear weights that stay as they are have been rounded to 4 bits, once."""
    trained = {f"mlp.experts.{name}" for name in deltas.get("experts", {})}
    trained |= {f"attention.{name}" for name in deltas.get("attention", {})}
    linear = {name for name in named_leaves(layer) if is_linear(name)}
    return quantize_layer(layer, group_size, linear - trained)


def straight_through(weight: Array, group_size: int, axis: int) -> Array:
    """A weight rounded to 4 bits as exports round it; its gradient passes as if it were not."""
    exact = jax.lax.stop_gradient(
        dequantize(quantize(weight, group_size=group_size, axis=axis, dtype=jnp.float32))
    )
    return exact + (weight - jax.lax.stop_gradient(weight))


# --- routed experts: a pool of channels, a row of the pool for each ---


def _expert_deltas(experts: Experts, config: DeltaConfig, key: Array) -> dict[str, Any]:
    if config.train == "full":
        names = [*EXPERT_WEIGHTS, *(n for n in EXPERT_BIASES if getattr(experts, n) is not None)]
        return {name: jnp.zeros(getattr(experts, name).shape) for name in names}
    channels, d_model = experts.w_gate.shape
    count, rank = experts.count.shape[0], config.rank
    keys = jax.random.split(key, len(EXPERT_WEIGHTS))

    def adapter(name: str, key: Array) -> dict[str, Array]:
        per_channel, per_expert = (channels, rank), (count, rank, d_model)
        if name == "w_down":  # channels are its inputs
            bound = 1 / jnp.sqrt(jnp.maximum(experts.count, 1)[_owner(experts)])[:, None]
            drawn = jax.random.uniform(key, per_channel, minval=-1.0) * bound
            factors, rows = {"channel": drawn, "expert": jnp.zeros(per_expert)}, (count, d_model)
        else:
            drawn = jax.random.uniform(key, per_expert, minval=-1.0) / math.sqrt(d_model)
            factors, rows = {"channel": jnp.zeros(per_channel), "expert": drawn}, (channels,)
        return factors if config.train == "lora" else factors | {"magnitude": jnp.zeros(rows)}

    return {name: adapter(name, own) for name, own in zip(EXPERT_WEIGHTS, keys, strict=True)}


def _merged_experts(
    experts: Experts, deltas: dict[str, Any], config: DeltaConfig
) -> dict[str, Array]:
    changed = {}
    for name, delta in deltas.items():
        weight = dequantize(getattr(experts, name)).astype(jnp.float32)
        if config.train == "full":
            changed[name] = weight + delta
            continue
        change = _pool_product(experts, delta["channel"], delta["expert"])
        change = change * (config.alpha / config.rank)
        changed[name] = _pool_dora(experts, name, weight, change, delta.get("magnitude"), config)
    if config.group_size is None:
        return changed
    return {
        name: straight_through(value, config.group_size, 0 if name == "w_down" else 1)
        if is_linear(name)
        else value
        for name, value in changed.items()
    }


def _owner(experts: Experts) -> Array:
    """Expert of each row of the pool, int32 [C]; E - 1 for rows that are nobody's."""
    ends, rows = jnp.cumsum(experts.count), jnp.arange(experts.w_gate.shape[0])
    owner = jnp.searchsorted(ends, rows, side="right")
    return jnp.minimum(owner, experts.count.shape[0] - 1).astype(jnp.int32)


def _pool_product(experts: Experts, channel: Array, expert: Array) -> Array:
    """Factors of all experts multiplied at once, [C, r] and [E, r, D] -> [C, D]; 0 for nobody's."""
    pool, owner, rows = experts.pool, _owner(experts), jnp.arange(channel.shape[0])
    inside = jnp.arange(pool.width)[None] < pool.count[:, None]  # [E, W]
    row = jnp.where(inside, pool.offset[:, None] + jnp.arange(pool.width)[None], len(rows))
    each = channel.at[row].get(mode="fill", fill_value=0)  # [E, W, r]
    product = jnp.einsum("ewr,erd->ewd", each, expert).reshape(-1, expert.shape[-1])
    place = owner * pool.width + rows - pool.offset[owner]
    place = jnp.where(rows < pool.count.sum(), place, len(product))
    return product.at[place].get(mode="fill", fill_value=0)


def _pool_dora(
    experts: Experts,
    name: str,
    weight: Array,
    change: Array,
    magnitude: Array | None,
    config: DeltaConfig,
) -> Array:
    if magnitude is None or name != "w_down":  # a row of the pool is a row of the matrix
        return _dora(weight, change, magnitude, config)
    owner, count = _owner(experts), experts.count.shape[0]

    def lengths(squares: Array) -> Array:  # [2, C, D] -> [2, E, D]: along an expert's channels
        return jax.vmap(lambda one: jax.ops.segment_sum(one, owner, count))(squares)

    direction, scale = _rescaled(weight, change, magnitude, lengths, config)
    return direction * scale[owner]


# --- single matrices ---


def _factors(weight: Array | QTensor, rank: int, key: Array) -> dict[str, Array]:
    rows, columns = weight.shape
    drawn = jax.random.uniform(key, (rank, columns), minval=-1.0) / math.sqrt(columns)
    return {"down": drawn, "up": jnp.zeros((rows, rank))}


def _product(factors: dict[str, Array], ratio: float) -> Array:
    return ratio * (factors["up"] @ factors["down"])


def _dora(
    weight: Array | QTensor, change: Array, magnitude: Array | None, config: DeltaConfig
) -> Array:
    """Magnitude times direction, row by row of a matrix [out, in]; the sum without a magnitude."""
    before = dequantize(weight).astype(jnp.float32)
    if magnitude is None:
        return before + change
    direction, scale = _rescaled(
        before, change, magnitude[:, None], lambda squares: squares.sum(2, keepdims=True), config
    )
    return direction * scale


def _rescaled(
    before: Array,
    change: Array,
    magnitude: Array,
    lengths: Callable[[Array], Array],
    config: DeltaConfig,
) -> tuple[Array, Array]:
    """A changed matrix, and by what its rows are to be multiplied to have their magnitude.

    Both lengths come of one sum, so that they are the same number where nothing has changed.

    Source: DoRA, arXiv:2402.09353, equation 5; the magnitude is kept as its change.
    """
    direction = before + change
    old, new = jnp.sqrt(lengths(jnp.square(jnp.stack([before, direction]))) + TINY)
    new = jax.lax.stop_gradient(new) if config.fixed_norm else new
    return direction, (old + magnitude) / new


def _attention_weights(layer: DecoderLayer) -> dict[str, Array]:
    fields = dataclasses.fields(layer.attention)  # type: ignore[arg-type]
    values = {field.name: getattr(layer.attention, field.name) for field in fields}
    return {n: value for n, value in values.items() if is_linear(n) and value is not None}
