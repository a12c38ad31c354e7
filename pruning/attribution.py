"""One sweep over the layers collects every statistic; a second, backward, adds the gradients.

Forward: the closed-form attributions need no gradient at all. Backward: a `custom_vjp` tap on the
experts' intermediate channels, whose cotangent is the sum of the channel scores, so no per-token
score array ever exists.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moe_jax.attention import Context
from moe_jax.grouped_matmul import Dispatch, expand, gather_rows, sum_by_expert
from moe_jax.moe import MoE, MoETrace
from moe_jax.quant import Weight, dequantize
from moe_jax.stream import LayerSource, contexts, embed, layer_forward, pad_rows
from moe_jax.transformer import DecoderLayer, Head
from pruning.statistics import ChannelStatistics, zeros

EPS = 1e-6  # of q = 1 / (|H|^2 + eps), arXiv 2606.18304's released loss
GRADIENT_SCORES = ("taylor", "abs_taylor", "fisher")


@jax.custom_vjp
def score_tap(h: Array, probe: Array, dispatch: Dispatch) -> Array:
    """Pass `h` through; under `jax.grad` the cotangent of `probe` is the channel scores.

    Args:
      h: [P, F] intermediate rows of the experts.
      probe: float32 [3, E, F], any values.
      dispatch: the row layout.

    Returns:
      `h`. The cotangent of `probe` is the sum over each expert's tokens of s, |s| and s^2 with
      s = h dloss/dh; the first is the true gradient of multipliers on the channels.

    Source: first-order Taylor pruning, arXiv:1906.10771.
    """
    return h


def _tap_backward(saved, dh):
    h, dispatch = saved
    score = h.astype(jnp.float32) * dh.astype(jnp.float32)
    sums = [sum_by_expert(f, dispatch) for f in (score, jnp.abs(score), jnp.square(score))]
    return dh, jnp.stack(sums), None


score_tap.defvjp(lambda h, probe, dispatch: (h, (h, dispatch)), _tap_backward)


def _weighted_sums(weights: list[Array], rows: Array, dispatch: Dispatch) -> Array:
    """Sum `rows` [P, F] over each expert's tokens under several row weights [P] at once.

    As a product per tile, one pass over `rows` serves all weights. Returns [E, len(weights), F].
    """
    tile = dispatch.tile
    weight = jnp.stack(weights, axis=-1).reshape(-1, tile, len(weights))
    tiles = jnp.einsum(
        "mtj,mtf->mjf",
        weight,
        rows.reshape(-1, tile, rows.shape[1]),
        precision=jax.lax.Precision.HIGHEST,  # accelerators would round the statistics
    )
    return jax.ops.segment_sum(tiles, dispatch.tile_expert, dispatch.tokens.shape[0])


def _layer_sums(moe: MoE, out: Array, trace: MoETrace) -> dict[str, Array]:
    """Forward sums of one batch: `out` [N, D] is the block output H."""
    y = trace.routed.astype(jnp.float32)
    valid = trace.valid.astype(jnp.float32)
    q = valid / (jnp.sum(jnp.square(out.astype(jnp.float32)), axis=-1) + EPS)  # [N]
    copies = moe.config.experts_per_token
    q_row, y_row = (gather_rows(values, trace.dispatch, copies) for values in (q, y))
    log_probability = jax.nn.log_softmax(trace.logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1)
    return _channel_sums(moe, trace, q_row, y_row) | {
        **_expert_sums(trace, q_row, y_row),
        "layer_energy": jnp.sum(q * jnp.sum(jnp.square(y), axis=-1)),
        "router_entropy": jnp.sum(valid * entropy),
    }


def _channel_sums(moe: MoE, trace: MoETrace, q: Array, y: Array) -> dict[str, Array]:
    """Sums per channel [E, F] from q [P] and the routed output y [P, D] in dispatch order."""
    d, w, rows = trace.dispatch, trace.row_weight, trace.rows
    one = jnp.ones_like(w)  # padding rows of the experts are zero themselves
    h, up, gate = (r.astype(jnp.float32) for r in (rows.hidden, rows.up, rows.gate))
    w_down = dequantize(moe.experts.w_down)
    pulled = expand(y.astype(rows.hidden.dtype), w_down, d, moe.experts.pool)  # <v, y>
    v_square = jnp.sum(jnp.square(w_down.astype(jnp.float32)), axis=-1)  # [C]
    weights = [one, jnp.square(w), q * jnp.square(w)]
    squares = _weighted_sums(weights, jnp.square(h), d)
    return {
        "hidden_square": squares[:, 0],
        "up_square": _weighted_sums([one], jnp.square(up), d)[:, 0],
        "gate_square": _weighted_sums([one], jnp.square(gate), d)[:, 0],
        "weighted_square": squares[:, 1],
        "energy": squares[:, 2] * v_square.reshape(moe.config.num_experts, -1),
        "shapley": _weighted_sums([q * w], h * pulled.astype(jnp.float32), d)[:, 0],
    }


def _expert_sums(trace: MoETrace, q: Array, y: Array) -> dict[str, Array]:
    """Sums per expert [E]; arguments as of `_channel_sums`."""
    w, z = trace.row_weight, trace.rows.out.astype(jnp.float32)
    square = jnp.sum(jnp.square(z), axis=-1)
    norm = jnp.sqrt(square)
    sums = {
        "phi": q * w * jnp.sum(z * y, axis=-1),
        "kappa": q * jnp.square(w) * square,
        "tokens": trace.dispatch.row_copy < trace.expert.size,
        "gate_mass": w,
        "output_norm": norm,
        "weighted_output_norm": w * norm,
        "output_square": square,
    }
    return {name: sum_by_expert(value, trace.dispatch) for name, value in sums.items()}


@jax.jit
def layer_statistics(
    layer: DecoderLayer, x: Array, context: Context
) -> tuple[Array, dict[str, Array]]:
    """One layer on one batch [B, T, D]: its output and, if it has experts, the forward sums."""
    out, trace = layer.trace(x, context)
    if trace is None or not isinstance(layer.mlp, MoE):
        return out, {}
    return out, _layer_sums(layer.mlp, out.reshape(-1, out.shape[-1]), trace)


@jax.jit
def layer_backward(
    layer: DecoderLayer, x: Array, context: Context, d_out: Array
) -> tuple[Array, Array | None]:
    """Pull the loss gradient through one layer: (d loss / d x, channel scores [3, E, F])."""
    if not isinstance(layer.mlp, MoE):
        return jax.vjp(lambda x: layer(x, context), x)[1](d_out)[0], None
    probe = jnp.zeros((3, layer.mlp.config.num_experts, layer.mlp.experts.width))
    tapped = lambda x, probe: layer(x, context, lambda h, d: score_tap(h, probe, d))  # noqa: E731
    return jax.vjp(tapped, x, probe)[1](d_out)


def _row_loss(head: Head, x: Array, tokens: Array, valid: Array) -> Array:  # [T, D], [T], [T]
    logits = head(x[:-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
    return jnp.sum(jnp.where(valid[:-1] & valid[1:], nll, 0.0))


@jax.jit
def loss_and_gradient(
    head: Head, x: Array, tokens: Array, valid: Array
) -> tuple[Array, Array]:  # [B, T, D], [B, T], [B, T]
    """Summed next-token loss (nats) and its gradient at the last hidden states.

    One sequence at a time: the logits of a batch would be the largest array of the sweep.
    """

    def one(row):
        return jax.value_and_grad(lambda x: _row_loss(head, x, row[1], row[2]))(row[0])

    losses, gradient = jax.lax.map(one, (x, tokens, valid))
    return losses.sum(), gradient


def collect_statistics(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    *,
    gradients: bool = False,
    batch: int = 8,
    chunk: int = 64,
    dtype=jnp.float32,
    on_step: Callable[[int, int], None] | None = None,
) -> ChannelStatistics:
    """Measure a model on calibration text: the one pass that every criterion and budget shares.

    Args:
      source: the dense model, in memory or on disk; at most two of its layers are held.
      tokens: int32 [B, T].
      valid: bool [B, T]; other positions contribute exactly nothing.
      gradients: also run the backward sweep of the end-to-end next-token loss.
      batch: sequences per step.
      chunk: sequences whose boundary activations are kept on the host at a time.
      dtype: of the activations; sums are float32 inside a batch, float64 across batches.
      on_step: receives (layer visits done, layer visits in all).

    Returns:
      The statistics.

    Raises:
      ValueError: if the model has no expert layer or its experts were already pruned unevenly.
    """
    config = source.config
    if not config.moe_layers:
        raise ValueError("the model has no layer with experts; there is nothing to prune")
    moe = config.moe
    sums = zeros(len(config.moe_layers), moe.num_experts, moe.d_expert, has_gradients=gradients)
    chunks = range(0, len(tokens), chunk)
    visits = len(chunks) * len(source) * (2 if gradients else 1)
    done = 0

    def visit() -> None:
        nonlocal done
        done += 1
        if on_step:
            on_step(done, visits)

    for start in chunks:
        part = pad_rows(tokens[start : start + chunk], batch)
        mask = pad_rows(valid[start : start + chunk], batch)
        boundary = _forward_sweep(source, part, mask, sums, batch, dtype, gradients, visit)
        if gradients:
            _backward_sweep(source, part, mask, sums, batch, boundary, visit)
        sums["total_tokens"] += mask.sum()
    return ChannelStatistics(**sums)


def _forward_sweep(
    source, tokens, valid, sums, batch, dtype, keep, visit
) -> list[list[np.ndarray]]:
    """Add the forward sums; returns the boundary activations per layer if `keep`."""
    places = contexts(source, valid, batch)
    x = [embed(source, tokens[i : i + batch], dtype) for i in range(0, len(tokens), batch)]
    boundary = [x]
    slots = {layer: slot for slot, layer in enumerate(source.config.moe_layers)}
    for index in range(len(source)):
        layer = source.layer(index)
        slot = slots.get(index)
        if slot is not None:
            _weight_norms(layer, sums, slot)
        outputs = []
        for part, place in zip(x, places, strict=True):
            if slot is None:
                outputs.append(np.asarray(layer_forward(layer, jnp.asarray(part), place)))
                continue
            out, batch_sums = layer_statistics(layer, jnp.asarray(part), place)
            for name, value in batch_sums.items():
                sums[name][slot] += np.asarray(value, np.float64)
            outputs.append(np.asarray(out))
        x = outputs
        if keep:
            boundary.append(x)
        visit()
    return boundary


def _backward_sweep(source, tokens, valid, sums, batch, boundary, visit) -> None:
    places = contexts(source, valid, batch)
    slots = {layer: slot for slot, layer in enumerate(source.config.moe_layers)}
    head, gradient = source.head, []
    for i, x in enumerate(boundary[-1]):
        rows = slice(i * batch, (i + 1) * batch)
        loss, d_x = loss_and_gradient(
            head, jnp.asarray(x), jnp.asarray(tokens[rows]), jnp.asarray(valid[rows])
        )
        sums["loss_sum"] += float(loss)
        gradient.append(np.asarray(d_x))
    for index in reversed(range(len(source))):
        layer = source.layer(index)
        for i, place in enumerate(places):
            d_x, scores = layer_backward(
                layer, jnp.asarray(boundary[index][i]), place, jnp.asarray(gradient[i])
            )
            gradient[i] = np.asarray(d_x)
            if scores is not None:
                for name, value in zip(
                    GRADIENT_SCORES, np.asarray(scores, np.float64), strict=True
                ):
                    sums[name][slots[index]] += value
        visit()


def _weight_norms(layer: DecoderLayer, sums: dict, slot: int) -> None:
    assert isinstance(layer.mlp, MoE)
    experts = layer.mlp.experts
    shape = sums["down_norm"].shape[1:]
    if bool(np.any(np.asarray(experts.count) != shape[1])):
        raise ValueError(
            f"expert widths {np.asarray(experts.count).tolist()} differ from d_expert={shape[1]}; "
            "score the dense model, then plan every budget from its statistics"
        )
    for name, weight in (
        ("down_norm", experts.w_down),
        ("up_norm", experts.w_up),
        ("gate_norm", experts.w_gate),
    ):
        sums[name][slot] = np.asarray(_row_norms(weight)).reshape(shape)


@jax.jit
def _row_norms(weight: Weight) -> Array:  # [C, D] -> float32 [C]
    return jnp.sqrt(jnp.sum(jnp.square(dequantize(weight).astype(jnp.float32)), axis=-1))
