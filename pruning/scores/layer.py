"""What one layer and one batch contribute to the statistics.

Forward: the closed-form attributions need no gradient at all. Backward: the cotangent of a probe
that the experts carry is the sum of the channel scores, so no per-token score array ever exists.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import Dispatch, gather_rows, sum_by_expert
from moe_jax.experts.moe import MoE, MoETrace
from moe_jax.experts.pool import Experts
from moe_jax.experts.run import RunExperts
from moe_jax.experts.swiglu import Projections, routed_experts
from moe_jax.experts.weights import routing_matrix
from moe_jax.stream import Batches
from moe_jax.transformer import DecoderLayer, Head, next_token_loss
from pruning.scores.expert_sums import observe_experts, output_sums
from pruning.scores.grams import GramRows, gram_rows
from pruning.scores.own import HiddenRows, Own, own_sums

EPS = 1e-6  # of q = 1 / (|H|^2 + eps), arXiv 2606.18304's released loss
GRADIENT_SCORES = ("taylor", "abs_taylor", "fisher", "gate_saliency", "gradient_square")


@struct.dataclass
class Kept:
    """What a backward pass through a layer's experts would otherwise compute again.

    Attributes:
      expert: int32 [N, k], the router's choice, so that the rows stay where they were.
      projections: gate and up rows of the experts.
    """

    expert: Array
    projections: Projections


def taylor_scores(hidden: Array, d_hidden: Array, gate: Array, d_gate: Array) -> tuple[Array, ...]:
    """Scores per token and channel, in the order of `GRADIENT_SCORES`.

    With s = h dloss/dh, the loss that the channel carries: s, |s|, s^2, |g dloss/dg|,
    (dloss/dh)^2. For the up projection p of a SwiGLU, p dloss/dp is s again. Biases need no score
    of their own: those of gate and up have acted on h, that of the output is no channel's.

    Source: first-order Taylor pruning, arXiv:1906.10771.
    """
    score = hidden * d_hidden
    return (
        score,
        jnp.abs(score),
        jnp.square(score),
        jnp.abs(gate * d_gate),
        jnp.square(d_hidden),
    )


def scored_experts(probe: Array, projections: Projections | None) -> RunExperts:
    """Run the experts so that the cotangent of `probe` [J, E, F] is the sums of `taylor_scores`.

    Known `projections` spare a CPU's backward pass two of its five products.
    """

    def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
        args = (x, row_weight, experts.weights, probe, dispatch, experts.pool, projections)
        return routed_experts(taylor_scores, *args), None

    return run


def token_weights(out: Array, valid: Array) -> Array:
    """q = 1 / (|H|^2 + eps) of each token, 0 where it is not valid.

    Args:
      out: [N, D], the block output H.
      valid: bool [N].

    Returns:
      float32 [N].
    """
    return valid.astype(jnp.float32) / (jnp.sum(jnp.square(out.astype(jnp.float32)), axis=-1) + EPS)


def expert_sums(
    experts: Experts, trace: MoETrace, q: Array, y: Array, own: Own = ()
) -> dict[str, Array]:
    """Forward sums of one batch over each expert's tokens, float32 [E, ...].

    Args:
      experts: of a layer, or of a group of one.
      trace: of a run of `observe_experts`.
      q: float32 [N], `token_weights`.
      y: float32 [N, D], the routed output of all experts of the layer.
      own: items of `STATISTICS` to add.
    """
    d, w, seen = trace.dispatch, trace.row_weight, trace.kept
    energy, shapley = output_sums(experts, seen.hidden, w, d, q, y)
    names = ("hidden_square", "up_square", "gate_square", "weighted_square")
    phi = shapley.sum(axis=1)  # <z, y> is the sum of h <v, y> over the channels
    if experts.b_down is not None:  # and <b, y>: the bias is the expert's, not a channel's
        phi += _bias_attribution(experts.b_down, trace, q, y)
    norm = jnp.sqrt(seen.out_square)
    by_expert = {
        "kappa": gather_rows(q, d, d.copies) * jnp.square(w) * seen.out_square,
        "tokens": d.row_copy < trace.expert.size,
        "gate_mass": w,
        "output_norm": norm,
        "weighted_output_norm": w * norm,
        "output_square": seen.out_square,
        "weighted_output_square": w * seen.out_square,
    }
    return {
        **dict(zip(names, seen.squares, strict=True)),
        **{name: sum_by_expert(value, d) for name, value in by_expert.items()},
        "unit_energy": energy,  # of channels whose vector has norm 1
        "shapley": shapley,
        "phi": phi,
        **(own_sums(own, _rows(trace), d, trace.expert.size) if own else {}),
    }


def block_sums(trace: MoETrace, q: Array, y: Array) -> dict[str, Array]:
    """Forward sums of one batch that are no single expert's; arguments as of `expert_sums`."""
    valid = trace.valid.astype(jnp.float32)
    probability = trace.probability
    entropy = jnp.sum(jax.scipy.special.entr(probability), axis=-1)
    return {
        "probability_mass": jnp.sum(valid[:, None] * probability, axis=0),
        "layer_energy": jnp.sum(q * jnp.sum(jnp.square(y), axis=-1)),
        "router_entropy": jnp.sum(valid * entropy),
    }


def _rows(trace: MoETrace) -> HiddenRows:
    seen = trace.kept
    return HiddenRows(seen.hidden.astype(jnp.float32), trace.row_weight, seen.out_square)


def _bias_attribution(bias: Array, trace: MoETrace, q: Array, y: Array) -> Array:
    """Sum over tokens of q w <b, y> for the bias b of each expert's output, float32 [E]."""
    routing = routing_matrix(trace.row_weight, trace.dispatch, len(y))  # [N, E]
    pulled = jnp.dot(y, bias.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(q[:, None] * routing * pulled, axis=0)


@partial(jax.jit, static_argnames=("keep", "own", "rows"))
def layer_statistics(
    layer: DecoderLayer,
    x: Array,
    context: Context,
    keep: bool = False,
    own: Own = (),
    rows: bool = False,
) -> tuple[Array, Array, dict[str, Array], Kept | None, GramRows | None]:
    """One layer on one batch [B, T, D]; `own` are items of `STATISTICS` to add to the sums.

    Returns:
      (hidden states between attention and feed-forward, output, forward sums if it has experts,
      what `layer_backward` can use if `keep` asks for it and it has experts, what the tokens add to
      Grams if `rows` asks for it and it has experts).
    """
    middle, _ = layer.attend(x, context)
    out, trace = layer.feed_forward(middle, context, partial(observe_experts, keep=keep))
    if trace is None or not isinstance(layer.mlp, MoE):
        return middle, out, {}, None, None
    kept = Kept(expert=trace.expert, projections=trace.kept.projections) if keep else None
    q = token_weights(out.reshape(-1, out.shape[-1]), trace.valid)
    y = trace.routed.astype(jnp.float32)
    sums = expert_sums(layer.mlp.experts, trace, q, y, own) | block_sums(trace, q, y)
    return middle, out, sums, kept, gram_rows(trace, q) if rows else None


@jax.jit
def feed_forward_backward(
    layer: DecoderLayer, middle: Array, context: Context, d_out: Array, kept: Kept | None = None
) -> tuple[Array, Array | None]:
    """Pull the loss gradient through a layer's second half, which is computed again.

    Args:
      layer: the layer.
      middle: [B, T, D] its state after attention.
      context: positions of the tokens.
      d_out: gradient at the output.
      kept: what `layer_statistics` kept of the same batch, if it did.

    Returns:
      (gradient at `middle`, channel scores [J, E, F] or None for a dense layer).
    """
    if not isinstance(layer.mlp, MoE):
        return jax.vjp(lambda x: layer.feed_forward(x, context)[0], middle)[1](d_out)[0], None
    experts = layer.mlp.experts  # all of the layer's, or those of this device
    shape = (len(GRADIENT_SCORES), experts.count.shape[0], experts.width)
    expert, projections = (kept.expert, kept.projections) if kept else (None, None)

    def half(x, probe):
        return layer.feed_forward(x, context, scored_experts(probe, projections), expert)[0]

    return jax.vjp(half, middle, jnp.zeros(shape))[1](d_out)


@jax.jit
def attention_backward(layer: DecoderLayer, x: Array, context: Context, d_middle: Array) -> Array:
    """Pull a gradient after attention back to the layer's input `x` [B, T, D]."""
    return jax.vjp(lambda x: layer.attend(x, context)[0], x)[1](d_middle)[0]


def layer_backward(
    layer: DecoderLayer, x: Array, middle: Array, context: Context, d_out: Array
) -> Array:
    """Pull the loss gradient from a layer's output back to its input `x` [B, T, D]."""
    d_middle, _ = feed_forward_backward(layer, middle, context, d_out)
    return attention_backward(layer, x, context, d_middle)


@jax.jit
def loss_and_gradient(
    head: Head, x: Array, tokens: Array, valid: Array, counted: Array | None = None
) -> tuple[Array, Array]:  # [B, T, D], [B, T], [B, T], [B, T] -> scalar, [B, T, D]
    """Summed next-token loss (nats) and its gradient at the last hidden states.

    One sequence at a time: the logits of a batch would be the largest array of the sweep.
    """

    def one(row):
        return jax.value_and_grad(lambda x: next_token_loss(head, x, *row[1:]))(row[0])

    losses, gradient = jax.lax.map(one, (x, tokens, valid, counted))
    return losses.sum(), gradient


def batch_words(text: Batches, rows: slice) -> list[np.ndarray | None]:
    """Tokens, valid and counted of some rows, as `loss_and_gradient` takes them."""
    parts = (text.tokens, text.valid, text.counted)
    return [None if part is None else part[rows] for part in parts]


def batch_loss(head: Head, text: Batches, x: Array, rows: slice) -> tuple[float, Array]:
    """Summed loss of one batch of a text, nats, and its gradient at its last states [b, T, D]."""
    words = jax.tree.map(jnp.asarray, batch_words(text, rows))
    loss, gradient = loss_and_gradient(head, x, *words)
    return float(loss), gradient


def loss_gradient(head: Head, text: Batches, last: list[np.ndarray]) -> list[np.ndarray]:
    """Where a way down begins: the loss gradient at a text's last hidden states.

    Args:
      head: of the model.
      text: the batches.
      last: last hidden states [b, T, D] of each batch; replaced by their gradients.

    Returns:
      `last`.
    """
    return text.each(last, lambda x, place, rows: batch_loss(head, text, x, rows)[1])
