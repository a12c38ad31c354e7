"""Details of the experts that only some criteria need: vectors per expert and pairs of experts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import gather_rows, make_dispatch, sum_by_expert, tile_height
from moe_jax.experts.expert_rows import expert_rows
from moe_jax.experts.grouped_matmul import float_bits, weight_bits
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.experts.run import gated_experts
from moe_jax.norm import rms_norm
from moe_jax.quant import dequantize
from moe_jax.transformer import DecoderLayer
from pruning.scores.layer import EPS
from pruning.scores.similarity import linear_cka

SAMPLE = 512  # tokens on which the outputs of all experts are compared
CLIP = 0.01  # share of an expert's tokens whose contribution the paper's release clips
# What is made of the norms of experts' inputs, plain or times the routing weight, by their squares.
WANDA = {
    "input_square": ("wanda_up", "wanda_gate"),
    "weighted_input_square": ("routed_wanda_up", "routed_wanda_gate"),
}


def add_details(
    sums: dict[str, np.ndarray],
    part: int,
    layer: DecoderLayer,
    middle: Array,
    out: Array,
    context: Context,
) -> None:
    """Add to what `ChannelStatistics` has under "expert-details", of one layer.

    Args:
      sums: [parts, ...] each; gets `similarity` [1, E, E] with the first batch that there is.
      part: whose batch it is.
      layer: the layer.
      middle, out: [B, T, D], the states before and after the experts.
      context: positions of the tokens.
    """
    found, owner, contribution = _batch_details(layer, middle, out, context)
    for name, value in found.items():
        sums[name][part] += np.asarray(value, np.float64)
    experts = sums["clipped_phi"].shape[1]
    sums["clipped_phi"][part] += clipped_sums(np.asarray(contribution), np.asarray(owner), experts)
    if "similarity" not in sums:
        tokens = np.flatnonzero(np.asarray(context.valid))
        tokens = tokens[np.linspace(0, len(tokens) - 1, min(SAMPLE, len(tokens))).astype(int)]
        outputs = all_outputs(layer, middle.reshape(-1, middle.shape[-1])[tokens])
        sums["similarity"] = np.asarray(linear_cka(np.asarray(outputs)), np.float64)[None]


@jax.jit
def _batch_details(layer: DecoderLayer, middle: Array, out: Array, context: Context):
    """(sums, expert of each row, E for padding, [P, D] each row's parts of phi)."""
    assert isinstance(layer.mlp, MoE)
    keep_all = gated_experts(lambda hidden, dispatch: hidden)
    _, trace = layer.feed_forward(middle, context, keep_all)
    assert trace is not None
    d, rows, w = trace.dispatch, trace.kept, trace.row_weight
    z = rows.out.astype(jnp.float32)
    flat = out.reshape(-1, out.shape[-1]).astype(jnp.float32)
    q = trace.valid.astype(jnp.float32) / (jnp.sum(jnp.square(flat), axis=-1) + EPS)
    q_row = gather_rows(q, d, d.copies)
    y_row = gather_rows(trace.routed.astype(jnp.float32), d, d.copies)
    tokens, copies = trace.expert.shape
    weighted = (
        jnp.zeros((tokens * copies, z.shape[1])).at[d.row_copy].set(z * w[:, None], mode="drop")
    )
    u = weighted.reshape(tokens, copies, -1)
    pairs = jnp.einsum("nkd,njd->nkj", u, u, precision=jax.lax.Precision.HIGHEST)
    count = d.tokens.shape[0]
    gram = jnp.zeros((count, count)).at[trace.expert[:, :, None], trace.expert[:, None]].add(pairs)
    x_square = jnp.square(rows.x.astype(jnp.float32))
    sums = {
        "input_square": sum_by_expert(x_square, d),
        "weighted_input_square": sum_by_expert(x_square * jnp.square(w)[:, None], d),
        "output_sum": sum_by_expert(z, d),
        "output_coordinate_square": sum_by_expert(jnp.square(z), d),
        "output_gram": gram,
    }
    real = d.row_copy < tokens * copies
    owner = jnp.where(real, jnp.repeat(d.tile_expert, d.tile), count)
    return sums, owner, (q_row * w)[:, None] * z * y_row


def clipped_sums(contribution: np.ndarray, owner: np.ndarray, experts: int) -> np.ndarray:
    """Sum each expert's contributions after clipping the largest of every coordinate.

    Args:
      contribution: [P, D].
      owner: int [P], expert of each row; rows of `experts` and above are left out.
      experts: E.

    Returns:
      float64 [E].

    Source: the released scoring code of arXiv 2606.18304, without its moving average.
    """
    sums = np.zeros(experts)
    for expert in range(experts):
        rows = contribution[owner == expert].astype(np.float64)
        if len(rows):
            most = np.quantile(np.abs(rows), 1 - CLIP, axis=0)
            sums[expert] = np.clip(rows, -most, most).sum()
    return sums


@jax.jit
def all_outputs(layer: DecoderLayer, middle: Array) -> Array:  # [S, D] -> [E, S, D]
    """Outputs of every expert of a layer for the same tokens, routed there or not.

    Args:
      layer: with experts.
      middle: states after attention.

    Returns:
      Expert outputs before any routing weight.
    """
    return all_rows(layer, middle)[1]


def all_rows(layer: DecoderLayer, middle: Array) -> tuple[Array, Array]:
    """The same with the hidden rows behind them: ([E, S, F], [E, S, D])."""
    assert isinstance(layer.mlp, MoE)
    experts: Experts = layer.mlp.experts
    count, sample = layer.mlp.config.num_experts, middle.shape[0]
    x = rms_norm(middle, layer.mlp_norm, layer.norm_eps)
    owner = jnp.tile(jnp.arange(count, dtype=jnp.int32), sample)
    dispatch = make_dispatch(owner, count, tile_height(sample * count, count), count)
    rows = expert_rows(x, experts.weights, dispatch, experts.pool)

    def by_expert(found: Array) -> Array:
        empty = jnp.zeros((sample * count, found.shape[1]), found.dtype)
        placed = empty.at[dispatch.row_copy].set(found, mode="drop")
        return jnp.swapaxes(placed.reshape(sample, count, -1), 0, 1)

    return by_expert(rows.hidden), by_expert(rows.out)


def add_wanda(sums: dict[str, np.ndarray], layer: DecoderLayer, each_prefix: bool) -> None:
    """Add what needs the norms of the experts' inputs over the whole text.

    Args:
      sums: [parts, ...] each, of all batches; gets [1, E, F], or [parts, E, F] of each prefix.
      layer: the layer.
      each_prefix: for every number of parts instead.
    """
    for square, names in WANDA.items():
        prefixes = np.cumsum(sums[square], axis=0)
        wanted = prefixes if each_prefix else prefixes[-1:]
        pairs = [wanda_sums(layer, one) for one in wanted]
        for name, values in zip(names, zip(*pairs, strict=True), strict=True):
            sums[name] = np.stack(values).astype(np.float64)


def wanda_sums(layer: DecoderLayer, input_square: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum over a channel's up and gate weights of |W| times the norm of their input.

    Args:
      layer: with dense experts.
      input_square: [E, D] sums of squares of the experts' input coordinates, weighted or not.

    Returns:
      (up, gate), each [E, F].
    """
    assert isinstance(layer.mlp, MoE)
    experts = layer.mlp.experts
    norm = jnp.asarray(np.sqrt(input_square), jnp.float32)
    up, gate = (_weighted_mass(weight, norm) for weight in (experts.w_up, experts.w_gate))
    return np.asarray(up), np.asarray(gate)


@jax.jit
def _weighted_mass(weight, norm: Array) -> Array:  # [C, D], [E, D] -> [E, F]
    experts, d_model = norm.shape
    bits = weight_bits(dequantize(weight)).reshape(experts, -1, d_model)

    def of_expert(given: tuple[Array, Array]) -> Array:  # one at a time, as in `weight_facts`
        wide = jnp.abs(float_bits(given[0]).astype(jnp.float32))
        return jnp.dot(wide, given[1], precision=jax.lax.Precision.HIGHEST)

    return jax.lax.map(of_expert, (bits, norm))
