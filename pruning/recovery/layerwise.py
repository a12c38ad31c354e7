"""Training one layer after the other against the dense model's: one layer of each in memory."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context, make_context
from moe_jax.config import ModelConfig
from moe_jax.stream import LayerSource, in_batches, layer_forward, pad_rows
from moe_jax.training import HeldOut, TrainingConfig, balance_loss, train
from moe_jax.transformer import DecoderLayer
from pruning.recovery.deltas import DeltaConfig, Deltas, init_deltas, merged, rounded
from pruning.recovery.fit import FitOptions, TrainingText

EPS = 1e-6  # added to the squared length of a target


def layer_loss(
    layer: DecoderLayer,
    deltas: dict[str, Any],
    batch: dict[str, Array],
    *,
    model: ModelConfig,
    config: DeltaConfig,
    balance: float,
) -> tuple[Array, dict[str, Array]]:
    """How far the residual stream behind a layer is from the dense model's.

    Args:
      layer: of the student.
      deltas: its changes.
      batch: x and target [B, T, D], the streams before it (the student's) and behind it (the
        dense model's); valid bool [B, T].
      model: the architecture.
      config: of the changes.
      balance: factor of the load-balance loss.

    Returns:
      (scalar: mean over valid tokens of the squared error over the target's squared length,
      {"loss": the same without the balance}).
    """
    context = make_context(model.attention, model.max_position, batch["valid"])
    out, trace = merged(layer, deltas, config).trace(batch["x"], context)
    out, target = (x.astype(jnp.float32) for x in (out, batch["target"]))
    wrong = jnp.square(out - target).sum(-1) / (jnp.square(target).sum(-1) + EPS)
    valid = batch["valid"]
    count = jnp.maximum(valid.sum(), 1).astype(jnp.float32)
    loss = jnp.sum(jnp.where(valid, wrong, 0)) / count
    metrics = {"loss": loss}
    if balance and trace is not None:
        metrics["balance"] = balance_loss(trace)
        loss = loss + balance * metrics["balance"]
    return loss, metrics


@partial(jax.jit, static_argnames="config")
def changed_forward(
    layer: DecoderLayer, deltas: dict[str, Any], x: Array, context: Context, config: DeltaConfig
) -> Array:  # [B, T, D] -> [B, T, D]
    """A layer of the student with its changes."""
    return merged(layer, deltas, config)(x, context)


def fit_layers(
    dense: LayerSource,
    student: LayerSource,
    text: TrainingText,
    held: TrainingText,
    config: DeltaConfig,
    options: FitOptions,
    *,
    checkpoints: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_layer: Callable[[int, dict[str, float]], None] | None = None,
) -> Deltas:
    """Train the changes of each layer behind the layers below it that have theirs already.

    Args:
      dense: the dense model; each layer is read once.
      student: likewise.
      text: to train on; predictions are not read.
      held: to measure on.
      config: which weights change, none of them of attention.
      options: how; the shares of the losses at the head mean nothing here.
      checkpoints: folder of a folder of orbax checkpoints for each layer.
      on_step: called with the steps begun and the steps in all, of all layers.
      on_layer: receives the index of each layer that was trained, and its held-out loss "before"
        and "after".

    Returns:
      The changes.
    """
    rows, deltas = len(text), {}
    tokens, valid = (
        np.concatenate([getattr(one, name) for one in (text, held)]) for name in ("tokens", "valid")
    )
    every = in_batches(dense, tokens, valid, options.batch)
    streams = [every.embedded(dense, options.dtype) for _ in range(2)]  # dense, student
    schedule = options.schedule(rows)
    keys = jax.random.split(jax.random.key(options.seed), len(student))
    for index in range(len(student)):
        layer, teacher = student.layer(index), dense.layer(index)
        own = init_deltas(layer, config, keys[index])
        layer = layer if config.group_size is None else rounded(layer, own, config.group_size)
        every.each(streams[0], lambda x, place, _, it=teacher: layer_forward(it, x, place))
        if own:
            measured: dict[int, float] = {}
            own = _fit_layer(
                layer, own, _Pairs(streams, valid, rows, options), schedule, config, student.config,
                None if checkpoints is None else checkpoints / str(index),
                lambda step, at=index: on_step and on_step(
                    at * schedule.steps + step, len(student) * schedule.steps
                ),
                measured,
            )  # fmt: skip
            if on_layer and measured:
                on_layer(
                    index, {"before": measured[min(measured)], "after": min(measured.values())}
                )
        for group, part in own.items():
            deltas.setdefault(group, {})[str(index)] = part
        every.each(
            streams[1],
            lambda x, place, _, it=layer, own=own: changed_forward(it, own, x, place, config),
        )
    return deltas


class _Pairs:
    """What enters a layer of the student and what should come out, by window."""

    def __init__(
        self, streams: list[list[np.ndarray]], valid: np.ndarray, rows: int, options: FitOptions
    ):
        self.target, self.x = streams
        self.valid, self.rows, self.options = valid, rows, options

    def __len__(self) -> int:
        return len(self.valid)

    def of(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Some windows as `layer_loss` takes them."""
        size = self.options.batch

        def gathered(stream: list[np.ndarray]) -> np.ndarray:
            return np.stack([stream[row // size][row % size] for row in chosen.tolist()])

        return {"x": gathered(self.x), "target": gathered(self.target),
                "valid": self.valid[chosen]}  # fmt: skip


def _fit_layer(
    layer: DecoderLayer,
    own: dict[str, Any],
    pairs: _Pairs,
    schedule: TrainingConfig,
    config: DeltaConfig,
    model: ModelConfig,
    checkpoints: Path | None,
    on_step: Callable[[int], object],
    measured: dict[int, float],
) -> dict[str, Any]:
    options = pairs.options
    how = partial(layer_loss, model=model, config=config)
    loss = jax.tree_util.Partial(partial(how, balance=options.balance), layer)
    look = jax.jit(partial(how, balance=0.0))

    def batch(step: int) -> dict[str, np.ndarray]:
        on_step(step)
        found = pairs.of(options.chosen(step, pairs.rows))
        if options.accumulate == 1:
            return found
        return {n: v.reshape(options.accumulate, -1, *v.shape[1:]) for n, v in found.items()}

    def held_loss(step: int, own: dict[str, Any]) -> float:
        total = count = 0.0
        for start in range(pairs.rows, len(pairs), options.batch):
            part = pairs.of(np.arange(start, min(start + options.batch, len(pairs))))
            tokens = float(part["valid"].sum())
            part = {name: pad_rows(value, options.batch) for name, value in part.items()}
            total += tokens * float(look(layer, own, part)[1]["loss"])
            count += tokens
        measured[step] = total / max(count, 1.0)
        return measured[step]

    judge = HeldOut(held_loss, schedule.log_every, options.patience)
    return train(
        own, loss, batch, schedule, checkpoints=checkpoints,
        held_out=judge if pairs.rows < len(pairs) else None,
    )  # fmt: skip
