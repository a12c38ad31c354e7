"""Decoder layers out of named arrays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.export_format import Widths
from convert.reader import aligned_empty
from convert.rules import TensorRule, layer_rules, uniform_widths
from moe_jax.attention.delta_net import LinearAttention
from moe_jax.attention.grouped import Attention
from moe_jax.attention.latent import LatentAttention
from moe_jax.config import LatentAttentionConfig, ModelConfig
from moe_jax.experts.dense import DenseMLP, SharedExpert
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.norm import Centred
from moe_jax.transformer import DecoderLayer

CENTRED = ".offset"  # ends the path of a norm that a checkpoint keeps as what it exceeds one by
BLOCK = 128  # channels per step of the matmul loop over experts of unequal width

Arrays = dict[str, np.ndarray]  # attribute path below the layer -> array as it lies there


@dataclass(frozen=True)
class PoolShape:
    """Sizes that all layers' pools share, so that one compilation serves them all."""

    rows: int
    width: int
    block: int


def pool_shape(config: ModelConfig, widths: Widths) -> PoolShape:
    """Smallest common pool: no spare rows if all experts are `d_expert` wide."""
    most = max((sum(counts) for counts in widths), default=0)
    if widths == uniform_widths(config):
        return PoolShape(rows=most, width=config.moe.d_expert, block=config.moe.d_expert)
    widest = max((count for counts in widths for count in counts), default=0)
    block = min(BLOCK, max(widest, 1))
    return PoolShape(rows=most + block, width=-(-max(widest, 1) // block) * block, block=block)


def read_arrays(
    rules: tuple[TensorRule, ...],
    config: ModelConfig,
    index: int,
    counts: tuple[int, ...],
    rows: int,
    read: Callable[[str], np.ndarray],
) -> Arrays:
    """Arrays of one layer; experts are read straight into their pool, one at a time.

    Args:
      rules: of the family.
      config: the architecture.
      index: of the layer.
      counts: channels per expert.
      rows: of the pool [rows, D]; those after the last expert's are zero.
      read: name on disk -> array.

    Returns:
      The arrays.
    """
    arrays: Arrays = {}
    for rule, name in layer_rules(rules, config, index):
        if rule.layout == "identity":
            arrays[rule.ours] = read(name)
            continue
        if rule.layout in ("expert_vector", "emptied_vector"):
            vectors = np.zeros((len(counts), config.d_model), arrays["mlp.router"].dtype)
            for expert, count in enumerate(counts):
                if rule.has_expert(count):
                    vectors[expert] = read(name.replace("{expert}", str(expert)))
            arrays[rule.ours] = vectors
            continue
        pool, start = None, 0
        width = () if rule.shape == "F" else (config.d_model,)
        for expert, count in enumerate(counts):
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


def build_layer(
    arrays: Arrays, config: ModelConfig, index: int, counts: tuple[int, ...], pool: PoolShape
) -> DecoderLayer:
    """Make a layer, consuming `arrays`: where memory is shared with JAX, no weight is copied."""
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
        if config.moe.d_shared:
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
            config=config.moe,
        )
    return DecoderLayer(
        attention_norm=values["attention_norm"],
        attention=_attention(below("attention."), config, index),
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
