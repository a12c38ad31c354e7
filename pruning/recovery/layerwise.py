"""Training one layer after the other against the dense model's: one layer of each in memory."""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from moe_jax.attention.context import Context, make_context
from moe_jax.config import ModelConfig
from moe_jax.data_parallel import averaged, dealt, placed
from moe_jax.experts.moe import MoE, MoETrace
from moe_jax.losses import balance_loss
from moe_jax.stream import LayerSource, in_batches, layer_forward
from moe_jax.training import train
from moe_jax.transformer import DecoderLayer
from pruning.recovery.course import Course, filled_rows
from pruning.recovery.deltas import DeltaConfig, Deltas, init_deltas, merged, rounded

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
        dense model's); valid bool [B, T]; count, tokens by which the sum is divided.
      model: the architecture.
      config: of the changes.
      balance: factor of the load-balance loss.

    Returns:
      (scalar: sum over valid tokens of the squared error over the target's squared length, divided,
      {"loss": the same without the balance}).
    """
    wrong, trace = _wrong(layer, deltas, batch, model, config)
    loss = wrong / batch["count"]
    metrics = {"loss": loss}
    if balance and trace is not None:
        metrics["balance"] = balance_loss(trace)
        loss = loss + balance * metrics["balance"]
    return loss, metrics


def _wrong(
    layer: DecoderLayer,
    deltas: dict[str, Any],
    batch: dict[str, Array],
    model: ModelConfig,
    config: DeltaConfig,
) -> tuple[Array, MoETrace | None]:
    """(relative squared errors, summed over valid tokens; trace)."""
    context = make_context(model.attention, model.max_position, batch["valid"])
    out, trace = merged(layer, deltas, config).trace(batch["x"], context)
    out, target = (x.astype(jnp.float32) for x in (out, batch["target"]))
    wrong = jnp.square(out - target).sum(-1) / (jnp.square(target).sum(-1) + EPS)
    return jnp.sum(jnp.where(batch["valid"], wrong, 0)), trace


@cache
def _looking(mesh: Mesh | None, model: ModelConfig, config: DeltaConfig) -> Callable[..., Any]:
    def look(common: tuple[DecoderLayer, dict[str, Any]], batch: dict[str, Array]) -> Any:
        return _wrong(*common, batch, model, config)[0]

    return jax.jit(averaged(mesh, look))


@partial(jax.jit, static_argnames="config")
def changed_forward(
    layer: DecoderLayer, deltas: dict[str, Any], x: Array, context: Context, config: DeltaConfig
) -> Array:  # [B, T, D] -> [B, T, D]
    """A layer of the student with its changes."""
    return merged(layer, deltas, config)(x, context)


def fit_layers(
    dense: LayerSource,
    student: LayerSource,
    course: Course,
    *,
    on_layer: Callable[[int, dict[str, float]], None] | None = None,
) -> Deltas:
    """Train the changes of each layer behind the layers below it that have theirs already.

    Args:
      dense: the dense model; each layer is read once.
      student: likewise.
      course: the training, of no weights of attention; of its texts all valid positions are
        wanted, predictions are not read, shares of the losses at the head mean nothing here,
        checkpoints have a folder for each layer, and steps are those of all layers. On several
        devices each has a copy of the layer that is trained; streams are those of a process's
        windows, and go through layers on one of its devices.
      on_layer: receives the index of each layer that was trained, and its held-out loss "before"
        and "after".

    Returns:
      The changes.
    """
    config, options, deltas = course.config, course.options, {}
    tokens, valid = (
        np.concatenate([getattr(one, name) for one in (course.text, course.held)])
        for name in ("tokens", "valid")
    )
    every = in_batches(dense, tokens, valid, options.batch)
    streams = [every.embedded(dense, options.dtype) for _ in range(2)]  # dense, student
    keys = jax.random.split(jax.random.key(options.seed), len(student))
    for index in range(len(student)):
        layer, teacher = student.layer(index), dense.layer(index)
        own = init_deltas(layer, config, keys[index])
        layer = layer if config.group_size is None else rounded(layer, own, config.group_size)
        every.each(streams[0], lambda x, place, _, it=teacher: layer_forward(it, x, place))
        if own:
            pairs = _Pairs(streams, valid, every.rows[0].stop)
            part = _of_layer(course, index, len(student))
            own, losses = _fit_layer(layer, own, pairs, part, student.config)
            own = own if course.mesh is None else jax.tree.map(jnp.asarray, jax.device_get(own))
            if on_layer and losses:
                on_layer(index, losses)
        for group, changes in own.items():
            deltas.setdefault(group, {})[str(index)] = changes
        every.each(
            streams[1],
            lambda x, place, _, it=layer, own=own: changed_forward(it, own, x, place, config),
        )
    return deltas


def _of_layer(course: Course, index: int, layers: int) -> Course:
    """The training of one layer, whose steps are told as those of all layers."""
    folder, on_step = course.checkpoints, course.on_step
    return dataclasses.replace(
        course,
        checkpoints=None if folder is None else folder / str(index),
        on_step=on_step and (lambda step, steps: on_step(index * steps + step, layers * steps)),
    )


class _Pairs:
    """What enters a layer of the student and what should come out, by window."""

    def __init__(self, streams: list[list[np.ndarray]], valid: np.ndarray, batch: int):
        self.target, self.x = streams
        self.valid, self.batch = valid, batch

    def of(self, chosen: np.ndarray) -> dict[str, np.ndarray]:
        """Some windows as `layer_loss` takes them."""

        def gathered(stream: list[np.ndarray]) -> np.ndarray:
            places = [divmod(row, self.batch) for row in chosen.tolist()]
            return np.stack([stream[n][row] for n, row in places]) if places else stream[0][:0]

        return {"x": gathered(self.x), "target": gathered(self.target),
                "valid": self.valid[chosen]}  # fmt: skip


def _fit_layer(
    layer: DecoderLayer,
    first: dict[str, Any],
    pairs: _Pairs,
    course: Course,
    model: ModelConfig,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The trained changes, and the held-out loss of the first and of these; {} without windows."""
    options = course.options
    how = partial(layer_loss, model=model, config=course.config, balance=options.balance)
    schedule = course.schedule
    if isinstance(layer.mlp, MoE):
        schedule = course.schedule_of(layer.mlp.router)
    layer, first = placed(course.mesh, (layer, first))

    def batch(step: int) -> dict[str, Any]:
        chosen, own = course.begin(step)
        return options.parts(pairs.of(own)) | {"count": course.count(chosen)}

    def held_loss(own: dict[str, Any]) -> float:
        return _held_loss((layer, own), pairs, course, model)

    found = train(
        first,
        jax.tree_util.Partial(how, layer),
        batch,
        schedule,
        checkpoints=course.checkpoints,
        held_out=course.judge(lambda _, own: held_loss(own)),
        mesh=course.mesh,
    )
    # Measured here: of a training that was resumed, what came before is not measured on the way.
    told = {"before": held_loss(first), "after": held_loss(found)} if course.held else {}
    return found, told


def _held_loss(
    common: tuple[DecoderLayer, dict[str, Any]], pairs: _Pairs, course: Course, model: ModelConfig
) -> float:
    """Mean over the valid held-out tokens of all processes, as of `layer_loss`."""
    look, total = _looking(course.mesh, model, course.config), 0.0
    held = np.arange(len(course.text.tokens), len(pairs.valid))
    for own in course.held_parts():
        part = pairs.of(held[own])
        part = {name: filled_rows(value, course.rows) for name, value in part.items()}
        total += course.places * float(look(common, dealt(course.mesh, part)))
    return total / max(1, int(course.held.spent.sum()))
