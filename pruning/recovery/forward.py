"""The student with its changes: forward, and the loss of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.attention.context import Context, make_context
from moe_jax.experts.moe import MoETrace
from moe_jax.losses import balance_loss
from moe_jax.transformer import DecoderLayer, Transformer
from pruning.recovery.deltas import DeltaConfig, Deltas, merged
from pruning.recovery.loss import next_token_loss, prediction_losses


def layer_deltas(deltas: Deltas, index: int) -> dict[str, Any]:
    """The changes of one layer, by group."""
    return {name: part[str(index)] for name, part in deltas.items() if str(index) in part}


def student_hidden(
    model: Transformer,
    deltas: Deltas,
    tokens: Array,
    valid: Array,
    *,
    config: DeltaConfig,
    dtype=jnp.float32,
    remat: bool = True,
) -> tuple[Array, list[MoETrace | None]]:
    """Hidden states of the student before its head, and the trace of every layer.

    Args:
      model: the student.
      deltas: its changes.
      tokens: int32 [B, T].
      valid: bool [B, T].
      config: of the changes.
      dtype: of the activations.
      remat: compute each layer a second time in the backward pass, its merged weights too, instead
        of keeping them.

    Returns:
      ([B, T, D], traces).
    """
    c = model.config
    context = make_context(c.attention, c.max_position, valid)
    x, traces = model.embedding(tokens, dtype), []

    def run(layer: DecoderLayer, own: dict, x: Array, context: Context):
        return merged(layer, own, config).trace(x, context)

    run = jax.checkpoint(run) if remat else run
    for index, layer in enumerate(model.layers):
        x, trace = run(layer, layer_deltas(deltas, index), x, context)
        traces.append(trace)
    return x, traces


def student_loss(
    model: Transformer,
    deltas: Deltas,
    batch: dict[str, Array],
    *,
    config: DeltaConfig,
    balance: float,
    dtype=jnp.float32,
    remat: bool = True,
) -> tuple[Array, dict[str, Array]]:
    """Loss of a batch of windows.

    Args:
      model, deltas, config, dtype, remat: as of `student_hidden`.
      batch: tokens, valid and wanted [B, T]; count, positions by which the sums are divided; share
        of the next-token loss in [0, 1]; unless that is always 1, logp and token [B, T, k] of the
        teacher.
      balance: factor of the mean load-balance loss of the layers.

    Returns:
      (scalar, {"loss": without the balance, and its parts "nll" and, with a teacher, "kl"}).
    """
    hidden, traces = student_hidden(
        model, deltas, batch["tokens"], batch["valid"], config=config, dtype=dtype, remat=remat
    )

    names = ("tokens", "wanted", "logp", "token")
    rows, share = {name: batch[name] for name in names if name in batch}, batch["share"]
    # A window at a time, so that the logits of one are in memory.
    found = jax.lax.map(lambda one: _window_loss(model, *one, share), (hidden, rows))
    loss, parts = jax.tree.map(lambda sums: sums.sum() / batch["count"], found)
    metrics = {**parts, "loss": loss}
    if balance:
        routed = [balance_loss(trace) for trace in traces if trace is not None]
        metrics["balance"] = jnp.stack(routed).mean()
        loss = loss + balance * metrics["balance"]
    return loss, metrics


def _spent(
    model: Transformer, hidden: Array, row: dict[str, Array], share: Array
) -> tuple[Array, dict[str, Array]]:
    """Loss of a window, and its parts, summed over its wanted positions."""
    logits = model.head(hidden)
    if "logp" not in row:
        nll = next_token_loss(logits[None], row["tokens"][None])[0]
        parts = {"nll": jnp.sum(jnp.where(row["wanted"], nll, 0))}
        return parts["nll"], parts
    following = jnp.roll(row["tokens"], -1)  # the last position has none, and is not wanted
    each = prediction_losses(logits, following, row["logp"], row["token"])
    nll, kl = (jnp.sum(jnp.where(row["wanted"], one, 0)) for one in each)
    return share * nll + (1 - share) * kl, {"nll": nll, "kl": kl}


@jax.custom_vjp
def _window_loss(model, hidden, row, share):
    """`_spent`, whose gradient with respect to `hidden` is taken with it: logits are neither kept
    nor made a second time. All else is constant: no gradient reaches the head."""
    return _spent(model, hidden, row, share)


def _with_gradient(*args):
    return jax.value_and_grad(_spent, argnums=1, has_aux=True)(*args)


def _from_gradient(gradient, pulled):
    return None, gradient * pulled[0].astype(gradient.dtype), None, None


_window_loss.defvjp(_with_gradient, _from_gradient)
