"""Decoder layers out of named arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.export_format import Widths
from convert.rules import TensorRule, layer_rules, uniform_widths
from moe_jax.attention.delta_net import LinearAttention
from moe_jax.attention.grouped import Attention
from moe_jax.attention.latent import LatentAttention
from moe_jax.config import LatentAttentionConfig, ModelConfig
from moe_jax.experts.dense import DenseMLP, SharedExpert
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts, channels_per_step
from moe_jax.host_arrays import aligned_empty
from moe_jax.norm import Centred
from moe_jax.transformer import DecoderLayer

CENTRED = ".offset"  # ends the path of a norm that a checkpoint keeps as what it exceeds one by

REST = ("attention", "mlp.shared")  # paths begin so of what only the first group of a layer has

Arrays = dict[str, np.ndarray]  # attribute path below the layer -> array as it lies there


@dataclass(frozen=True)
class PoolShape:
    """Sizes that all layers' pools share, so that one compilation serves them all.

    Attributes:
      rows: of a pool, at most.
      width, block: of `Experts`.
      exact: whether a pool has no spare rows, because all experts are `d_expert` wide.
    """

    rows: int
    width: int
    block: int
    exact: bool = False

    def rows_of(self, counts: tuple[int, ...]) -> int:
        """Rows of a pool of experts of so many channels."""
        return sum(counts) if self.exact else self.rows


def pool_shape(config: ModelConfig, widths: Widths, at_once: int | None = None) -> PoolShape:
    """Smallest common pool of layers, or of groups of so many experts at once: no spare rows if all
    experts are `d_expert` wide."""
    groups = [counts[own] for counts in widths for own in expert_groups(len(counts), at_once)]
    most = max(map(sum, groups), default=0)
    if widths == uniform_widths(config):
        width = config.moe.d_expert
        return PoolShape(rows=most, width=width, block=width, exact=True)
    counts = np.array([count for layer in widths for count in layer], int)
    widest, block = max(1, counts.max(initial=0)), channels_per_step(counts)
    return PoolShape(rows=most + block, width=-(-widest // block) * block, block=block)


def expert_groups(experts: int, at_once: int | None) -> list[slice]:
    """Which experts of a layer are in memory together: all, or at most so many at once."""
    if not experts or at_once is None:
        return [slice(0, experts)]
    return [slice(start, min(start + at_once, experts)) for start in range(0, experts, at_once)]


def read_arrays(
    rules: tuple[TensorRule, ...],
    config: ModelConfig,
    index: int,
    counts: tuple[int, ...],
    rows: int,
    read: Callable[[str], np.ndarray],
    first: int = 0,
    alive: np.ndarray | None = None,
) -> Arrays:
    """Arrays of a layer or group; experts are read straight into their pool, one at a time.

    Args:
      rules: of the family.
      config: the architecture.
      index: of the layer.
      counts: channels per expert.
      rows: of the pool [rows, D]; those after the last expert's are zero.
      read: name on disk -> array.
      first: number of the first expert; of a group that does not begin with expert 0, `REST` is
        left out.
      alive: bool, which experts of the layer the router has rows for, if not all.

    Returns:
      The arrays; rows that the router lacks are zero.
    """
    arrays: Arrays = {}
    cut = alive is not None
    for rule, name in layer_rules(rules, config, index):
        if rule.layout == "identity":
            if not (first and rule.ours.startswith(REST)):
                found = read(name)
                arrays[rule.ours] = _spread(found, alive) if cut and "E" in rule.shape else found
            continue
        if rule.layout in ("expert_vector", "emptied_vector"):
            vectors = np.zeros((len(counts), config.d_model), arrays["mlp.router"].dtype)
            for expert, count in enumerate(counts):
                if rule.has_expert(count, cut):
                    vectors[expert] = read(name.replace("{expert}", str(first + expert)))
            arrays[rule.ours] = vectors
            continue
        pool, start = None, 0
        width = () if rule.shape == "F" else (config.d_model,)
        for expert, count in enumerate(counts, first):
            if not count:
                continue
            part = read(name.replace("{expert}", str(expert)))
            if pool is None:
                pool = aligned_empty((rows, *width), part.dtype)
            pool[start : start + count] = part.T if rule.layout == "expert_columns" else part
            start += count
        if pool is None:  # a layer that lost all its experts
            pool = aligned_empty((rows, *width), arrays["mlp.router"].dtype)
        pool[start:] = 0
        arrays[rule.ours] = pool
    return arrays


def _spread(rows: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Rows of some experts at the places of these among all."""
    full = np.zeros((len(alive), *rows.shape[1:]), rows.dtype)
    full[alive] = rows
    return full


def build_layer(
    arrays: Arrays,
    config: ModelConfig,
    index: int,
    counts: tuple[int, ...],
    pool: PoolShape,
    first: int = 0,
    alive: np.ndarray | None = None,
) -> DecoderLayer:
    """Make a layer, or of fewer experts a group, consuming `arrays`: where memory is shared with
    JAX, no weight is copied. `first` and `alive` as of `read_arrays`."""
    values: dict[str, Any] = {}
    for path in list(arrays):
        value = jax.device_put(arrays.pop(path), may_alias=True)
        whole = path.removesuffix(CENTRED)
        values[whole] = value if whole == path else Centred(value)

    def below(prefix: str) -> dict:
        found = {p.removeprefix(prefix): v for p, v in values.items() if p.startswith(prefix)}
        return {name: value for name, value in found.items() if "." not in name}

    if index in config.dense_layers:
        mlp = DenseMLP(**below("mlp."))
    else:
        shared = None
        if config.moe.d_shared and not first:
            gate = values.get("mlp.shared.gate")
            shared = SharedExpert(mlp=DenseMLP(**below("mlp.shared.mlp.")), gate=gate)
        experts = Experts(
            **below("mlp.experts."),
            count=jnp.asarray(counts, jnp.int32),
            width=pool.width,
            block=pool.block,
            activation=config.moe.activation,
        )
        mlp = MoE(
            router=values["mlp.router"],
            router_bias=values.get("mlp.router_bias"),
            logit_bias=values.get("mlp.logit_bias"),
            experts=experts,
            shared=shared,
            alive=None if alive is None else jnp.asarray(alive),
            first=None if len(counts) == config.moe.num_experts else jnp.asarray(first, jnp.int32),
            config=config.moe,
        )
    attention: Any = None if first else _attention(below("attention."), config, index)
    return DecoderLayer(
        attention_norm=values.get("attention_norm"),  # type: ignore[arg-type]
        attention=attention,
        mlp_norm=values["mlp_norm"],
        mlp=mlp,
        norm_eps=config.norm_eps,
    )


def _attention(weights: dict[str, Any], config: ModelConfig, index: int):
    linear = config.linear(index)
    if linear is not None:
        return LinearAttention(**weights, config=linear)
    if isinstance(config.attention, LatentAttentionConfig):
        return LatentAttention(**weights, config=config.attention)
    return Attention(**weights, config=config.attention, window=config.window(index))
