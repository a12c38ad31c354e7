"""One sweep over the layers collects every statistic; a second, backward, adds the gradients.

Forward: the closed-form attributions need no gradient at all. Backward: the cotangent of a probe
that the experts carry is the sum of the channel scores, so no per-token score array ever exists.
"""

import math
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from moe_jax.attention import Context
from moe_jax.grouped_matmul import Dispatch, gather_rows, sum_by_expert
from moe_jax.moe import Experts, MoE, MoETrace, RunExperts
from moe_jax.quant import Weight, dequantize
from moe_jax.stream import LayerSource, contexts, embed, pad_rows
from moe_jax.swiglu import routed_experts
from moe_jax.transformer import DecoderLayer, Head
from pruning.expert_sums import observe_experts, output_sums
from pruning.statistics import ChannelStatistics, zeros

EPS = 1e-6  # of q = 1 / (|H|^2 + eps), arXiv 2606.18304's released loss
GRADIENT_SCORES = ("taylor", "abs_taylor", "fisher")


def taylor_scores(hidden: Array, d_hidden: Array, gate: Array, d_gate: Array) -> tuple[Array, ...]:
    """s, |s| and s^2 with s = h dloss/dh, per token and channel; s is the loss that h carries.

    Source: first-order Taylor pruning, arXiv:1906.10771.
    """
    score = hidden * d_hidden
    return score, jnp.abs(score), jnp.square(score)


def scored_experts(probe: Array) -> RunExperts:
    """Run the experts so that the cotangent of `probe` [3, E, F] is the sums of `taylor_scores`."""

    def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
        args = (x, row_weight, experts.weights, probe, dispatch, experts.pool)
        return routed_experts(taylor_scores, *args), None

    return run


def _layer_sums(moe: MoE, out: Array, trace: MoETrace) -> dict[str, Array]:
    """Forward sums of one batch: `out` [N, D] is the block output H."""
    d, w, seen = trace.dispatch, trace.row_weight, trace.kept
    y = trace.routed.astype(jnp.float32)
    valid = trace.valid.astype(jnp.float32)
    q = valid / (jnp.sum(jnp.square(out.astype(jnp.float32)), axis=-1) + EPS)  # [N]
    energy, shapley = output_sums(moe.experts, seen.hidden, w, d, q, y)
    names = ("hidden_square", "up_square", "gate_square", "weighted_square")
    log_probability = jax.nn.log_softmax(trace.logits, axis=-1)
    entropy = -jnp.sum(jnp.exp(log_probability) * log_probability, axis=-1)
    norm = jnp.sqrt(seen.out_square)
    by_expert = {
        "kappa": gather_rows(q, d, d.copies) * jnp.square(w) * seen.out_square,
        "tokens": d.row_copy < trace.expert.size,
        "gate_mass": w,
        "output_norm": norm,
        "weighted_output_norm": w * norm,
        "output_square": seen.out_square,
    }
    return {
        **dict(zip(names, seen.squares, strict=True)),
        **{name: sum_by_expert(value, d) for name, value in by_expert.items()},
        "unit_energy": energy,  # of channels whose vector has norm 1
        "shapley": shapley,
        "phi": shapley.sum(axis=1),  # <z, y> is the sum of h <v, y> over the channels
        "layer_energy": jnp.sum(q * jnp.sum(jnp.square(y), axis=-1)),
        "router_entropy": jnp.sum(valid * entropy),
    }


@jax.jit
def layer_statistics(
    layer: DecoderLayer, x: Array, context: Context
) -> tuple[Array, Array, dict[str, Array]]:
    """One layer on one batch [B, T, D].

    Returns:
      (hidden states between attention and feed-forward, output, forward sums if it has experts).
    """
    middle, _ = layer.attend(x, context)
    out, trace = layer.feed_forward(middle, context, observe_experts)
    if trace is None or not isinstance(layer.mlp, MoE):
        return middle, out, {}
    return middle, out, _layer_sums(layer.mlp, out.reshape(-1, out.shape[-1]), trace)


@jax.jit
def layer_backward(
    layer: DecoderLayer, x: Array, middle: Array, context: Context, d_out: Array
) -> tuple[Array, Array | None]:
    """Pull the loss gradient through one layer.

    Args:
      layer: the layer.
      x, middle: [B, T, D] its input and its state after attention, so that the backward pass of
        either half recomputes that half alone.
      context: positions of the tokens.
      d_out: gradient at the output.

    Returns:
      (gradient at `x`, channel scores [3, E, F] or None for a dense layer).
    """
    if isinstance(layer.mlp, MoE):
        probe = jnp.zeros((3, layer.mlp.config.num_experts, layer.mlp.experts.width))
        half = lambda x, probe: layer.feed_forward(x, context, scored_experts(probe))[0]  # noqa: E731
        d_middle, scores = jax.vjp(half, middle, probe)[1](d_out)
    else:
        half = lambda x: layer.feed_forward(x, context)[0]  # noqa: E731
        (d_middle,), scores = jax.vjp(half, middle)[1](d_out), None
    return jax.vjp(lambda x: layer.attend(x, context)[0], x)[1](d_middle)[0], scores


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
        states = _States(source, part.shape, dtype) if gradients else None
        last = _forward_sweep(source, part, mask, sums, batch, dtype, states, visit)
        if states is not None:
            _backward_sweep(source, part, mask, sums, batch, last, states, visit)
        sums["total_tokens"] += mask.sum()
    return ChannelStatistics(**sums)


MEMORY_STATES = 2 << 30  # bytes of hidden states kept in memory; more go to a temporary file


class _States:
    """Hidden states before and in the middle of every layer: [L, 2, B, T, D] on the host."""

    def __init__(self, source: LayerSource, shape: tuple[int, ...], dtype):
        shape = (len(source), 2, *shape, source.config.d_model)
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        if size <= MEMORY_STATES:
            self.values = np.empty(shape, dtype)
            return
        file = tempfile.TemporaryFile(prefix="moe-states-")
        self.values = np.memmap(file, dtype, "w+", shape=shape)

    def put(self, layer: int, rows: slice, x: np.ndarray, middle: Array) -> None:
        self.values[layer, 0, rows], self.values[layer, 1, rows] = x, np.asarray(middle)

    def get(self, layer: int, rows: slice) -> tuple[Array, Array]:
        before, middle = self.values[layer, :, rows]
        return jnp.asarray(before), jnp.asarray(middle)


def _rows(count: int, batch: int) -> list[slice]:
    return [slice(start, start + batch) for start in range(0, count, batch)]


def _forward_sweep(source, tokens, valid, sums, batch, dtype, states, visit) -> list[np.ndarray]:
    """Add the forward sums, keep `states` if there are any; returns the last hidden states."""
    places, parts = contexts(source, valid, batch), _rows(len(tokens), batch)
    x = [embed(source, tokens[rows], dtype) for rows in parts]
    slots = {layer: slot for slot, layer in enumerate(source.config.moe_layers)}
    for index in range(len(source)):
        layer = source.layer(index)
        slot = slots.get(index)
        if slot is not None:
            _weight_norms(layer, sums, slot)
        for i, (rows, place) in enumerate(zip(parts, places, strict=True)):
            middle, out, batch_sums = layer_statistics(layer, jnp.asarray(x[i]), place)
            if states is not None:
                states.put(index, rows, x[i], middle)
            x[i] = np.asarray(out)
            for name, value in batch_sums.items():
                value = np.asarray(value, np.float64)
                if name == "unit_energy":
                    name, value = "energy", value * np.square(sums["down_norm"][slot])
                sums[name][slot] += value
        visit()
    return x


def _backward_sweep(source, tokens, valid, sums, batch, last, states, visit) -> None:
    places, parts = contexts(source, valid, batch), _rows(len(tokens), batch)
    slots = {layer: slot for slot, layer in enumerate(source.config.moe_layers)}
    head, gradient = source.head, []
    for x, rows in zip(last, parts, strict=True):
        loss, d_x = loss_and_gradient(
            head, jnp.asarray(x), jnp.asarray(tokens[rows]), jnp.asarray(valid[rows])
        )
        sums["loss_sum"] += float(loss)
        gradient.append(np.asarray(d_x))
    for index in reversed(range(len(source))):
        layer = source.layer(index)
        for i, (rows, place) in enumerate(zip(parts, places, strict=True)):
            x, middle = states.get(index, rows)
            d_x, scores = layer_backward(layer, x, middle, place, jnp.asarray(gradient[i]))
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
