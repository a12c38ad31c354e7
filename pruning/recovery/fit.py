"""Training a student end to end, in the memory of one device or of a mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from moe_jax.data_parallel import averaged, dealt, placed
from moe_jax.experts.moe import MoE
from moe_jax.stream import LayerSource
from moe_jax.training import train
from moe_jax.transformer import Transformer
from pruning.recovery.course import Course, filled_rows
from pruning.recovery.deltas import DeltaConfig, Deltas, init_deltas, rounded
from pruning.recovery.forward import student_loss
from pruning.recovery.parts import dealt_deltas, dealt_layer, dealt_rows, gathered_deltas


@dataclass(frozen=True, eq=False)
class PlacedStudent:
    """A student on its devices, with changes that change nothing yet.

    Attributes:
      model: in memory; where it rounds, weights that stay as they are have been rounded.
      deltas: the changes.
      rows: by layer, where its pool's rows lie, if devices share experts; see `parts`.
    """

    model: Transformer
    deltas: Deltas
    rows: dict[str, tuple[np.ndarray, int]]

    def gathered(self, deltas: Deltas) -> Deltas:
        """Trained changes with the rows of pools in their order."""
        if not self.rows:
            return deltas
        return {
            group: {index: gathered_deltas(part, *self.rows[index]) if group == "experts" else part
                    for index, part in layers.items()}
            for group, layers in deltas.items()
        }  # fmt: skip


def begun(source: LayerSource, course: Course) -> PlacedStudent:
    """Read a student, a layer after the other, each onto the devices of a training."""
    config, mesh, parts = course.config, course.mesh, course.spread.parts
    keys = jax.random.split(jax.random.key(course.options.seed), len(source))
    layers, deltas, rows = [], {}, {}
    for index, key in enumerate(keys):
        layer = source.layer(index)
        own = init_deltas(layer, config, key)
        layer = layer if config.group_size is None else rounded(layer, own, config.group_size)
        if parts > 1 and isinstance(layer.mlp, MoE):
            places = dealt_rows(layer.mlp.experts, parts)
            rows[str(index)] = places, layer.mlp.experts.w_gate.shape[0]
            layer = dealt_layer(layer, places)
            own = {group: dealt_deltas(part, places) if group == "experts" else part
                   for group, part in own.items()}  # fmt: skip
        layer, own = placed(mesh, (layer, own))
        layers.append(layer)
        for group, part in own.items():
            deltas.setdefault(group, {})[str(index)] = part
    tied = source.config.tie_embeddings
    model = Transformer(
        embedding=placed(mesh, source.embedding),
        layers=tuple(layers),
        final_norm=placed(mesh, source.head.norm),
        lm_head=None if tied else placed(mesh, source.head.weight),
        config=source.config,
    )
    return PlacedStudent(model, deltas, rows)


def fit(
    source: LayerSource,
    course: Course,
    *,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    on_held_out: Callable[[int, dict[str, float]], None] | None = None,
) -> Deltas:
    """Train changes of a student; a run that was interrupted goes on from its checkpoints.

    Args:
      source: the student; each layer is read once.
      course: the training; on several devices each has a copy, but for the experts on an axis of
        experts, and some windows of every batch.
      on_log: receives (step, mean metrics since the last time).
      on_held_out: receives (step, nats per token on `held`: "loss", "nll", "kl"), 0 first.

    Returns:
      The changes with the least held-out loss.
    """
    options, student = course.options, begun(source, course)
    model = student.model
    schedule = course.schedule_of(
        {str(i): layer.mlp.router for i, layer in enumerate(model.layers)
         if isinstance(layer.mlp, MoE)}
    )  # fmt: skip
    how = partial(
        student_loss,
        config=course.config,
        balance=options.balance,
        dtype=options.dtype,
        remat=options.remat,
    )

    def batch(step: int) -> dict[str, Any]:
        chosen, own = course.begin(step)
        count = course.count(chosen)
        share = options.share_at(step / max(1, schedule.steps - 1))
        rows = options.parts(course.text.rows(own))
        return rows | {"count": count, "share": np.full_like(count, share)}

    def measured(step: int, deltas: Deltas) -> float:
        found = held_out_losses(model, deltas, course)
        if on_held_out:
            on_held_out(step, found)
        return found["loss"]

    return student.gathered(train(
        student.deltas,
        jax.tree_util.Partial(how, model),
        batch,
        schedule,
        checkpoints=course.checkpoints,
        on_log=on_log,
        held_out=course.judge(measured),
        mesh=course.mesh,
    ))  # fmt: skip


def held_out_losses(model: Transformer, deltas: Deltas, course: Course) -> dict[str, float]:
    """Nats per predicted token of the held-out text: "nll", with a teacher "kl", and their mixture
    "loss"; model and changes are on the devices of the course."""
    text, options, sums = course.held, course.options, {}
    look = _looking(course.mesh, course.config, options.dtype)
    for own in course.held_parts():
        part: dict[str, Any] = {
            name: filled_rows(value, course.rows) for name, value in text.rows(own).items()
        }
        # The mean over all places is to be a sum.
        part |= {"count": np.float32(1 / course.places), "share": np.float32(options.share_to)}
        for name, value in look((model, deltas), dealt(course.mesh, part)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / max(1, int(text.spent.sum())) for name, value in sums.items()}


@cache
def _looking(mesh: Mesh | None, config: DeltaConfig, dtype: Any) -> Callable[..., Any]:
    def losses(common: tuple[Transformer, Deltas], batch: dict[str, Array]) -> dict[str, Array]:
        return student_loss(
            *common, batch, config=config, balance=0.0, dtype=dtype, remat=False
        )[1]  # fmt: skip

    return jax.jit(averaged(mesh, losses))
