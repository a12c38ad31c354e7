"""Gradient training with checkpoints and resume: pretraining, and any recovery after pruning.

The loop knows a pytree of parameters and a loss; what the parameters mean is the caller's.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from moe_jax.data_parallel import averaged, dealt, placed, placed_alike
from moe_jax.structure import named_leaves
from moe_jax.transformer import Transformer

logger = logging.getLogger(__name__)

Parameters = Any
Loss = Callable[[Parameters, Any], tuple[Array, dict[str, Array]]]
OnLog = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Schedule of a run: AdamW, linear warm-up, cosine decay, global-norm clipping.

    Weight decay touches matrices only. `checkpoint_every` counts steps.

    Attributes:
      b2: decay of Adam's second moments.
      end_rate: share of the learning rate that is left at the last step.
      accumulate: batches per step; each leaf of a batch then has them as its first axis, and the
        step follows the mean of their gradients.
      group_rates: learning rates of parts of the parameters, by their key in the outermost dict, or
        of parts of such a part by their key in it, as multiples of `learning_rate`; others have 1.
    """

    steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    checkpoint_every: int = 250
    log_every: int = 50
    b2: float = 0.95
    end_rate: float = 0.1
    accumulate: int = 1
    group_rates: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)

    def schedule(self) -> optax.Schedule:
        """The learning rate of each step."""
        end = self.learning_rate * self.end_rate
        return optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup_steps, self.steps, end
        )

    def optimizer(self) -> optax.GradientTransformation:
        """The optax transformation this schedule describes."""

        def is_matrix(tree):
            return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

        def scaled(updates, parameters):
            return _scaled(updates, self.group_rates)

        adamw = optax.adamw(
            self.schedule(), b2=self.b2, weight_decay=self.weight_decay, mask=is_matrix
        )
        steps = [optax.clip_by_global_norm(self.clip_norm), adamw]
        return optax.chain(*steps, *([optax.stateless(scaled)] if self.group_rates else []))


def _scaled(updates: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, Any]:
    """Updates times the rates of their parts, or of the parts of these."""
    found = {}
    for name, part in updates.items():
        rate = rates.get(name, 1.0)
        within = isinstance(rate, Mapping)
        found[name] = _scaled(part, rate) if within else optax.tree.scale(rate, part)
    return found


@dataclass(frozen=True)
class HeldOut:
    """A loss on what is not trained on, which says which parameters of a run are the best.

    Attributes:
      loss: (steps done, parameters) -> nats.
      every: steps from one measurement to the next; the first parameters and the last are measured
        too.
      patience: measurements in a row without a new best after which the run ends; None for never.
    """

    loss: Callable[[int, Parameters], float]
    every: int
    patience: int | None = None

    def judge(self, step: int, progress: dict[str, Any]) -> None:
        """Measure the parameters in `progress`, and keep them there if they are the best yet."""
        found = self.loss(step, progress["parameters"])
        if found < float(progress["least"]):
            # Of the arrays that are there: on a mesh they lie on all devices.
            progress |= {"best": progress["parameters"],
                         "least": jnp.minimum(progress["least"], found),
                         "stale": progress["stale"] * 0}  # fmt: skip
        else:
            progress["stale"] = progress["stale"] + 1

    def is_over(self, progress: dict[str, Any]) -> bool:
        """Whether nothing better was found for too long."""
        return self.patience is not None and int(progress["stale"]) >= self.patience


def split_parameters(model: Transformer) -> tuple[dict[str, Array], Callable[..., Transformer]]:
    """Separate what gradients change from what they do not.

    Args:
      model: any pytree of arrays.

    Returns:
      (float leaves by dotted path, function that puts such leaves back into the model).
    """
    leaves, structure = named_leaves(model), jax.tree.structure(model)
    floating = {
        name: leaf for name, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)
    }

    def rebuild(parameters: dict[str, Array]) -> Transformer:
        merged = [parameters.get(name, leaf) for name, leaf in leaves.items()]
        return jax.tree.unflatten(structure, merged)

    return floating, rebuild


def train(
    parameters: Parameters,
    loss: Loss,
    batch: Callable[[int], Any],
    config: TrainingConfig,
    *,
    checkpoints: Path | None = None,
    on_log: OnLog | None = None,
    held_out: HeldOut | None = None,
    mesh: Mesh | None = None,
) -> Parameters:
    """Minimise a loss; a run that was interrupted goes on where its last checkpoint stands.

    On a mesh every device follows the loss of its windows, and a step the mean of their gradients;
    all processes call this alike, and see the same folder of checkpoints.

    Args:
      parameters: pytree of float arrays.
      loss: (parameters, batch) -> (scalar, metrics); traced once. Arrays that it reads besides,
        such as a model that stays as it is, come in as those of a `jax.tree_util.Partial`.
      batch: step -> batch. It must depend on the step alone, so that a resumed run sees what an
        uninterrupted one would have seen.
      config: the schedule.
      checkpoints: folder of orbax checkpoints; None keeps nothing.
      on_log: receives (step, mean metrics and steps per second) every `config.log_every` steps.
      held_out: measured on the way; None takes the last parameters for the best.
      mesh: of `data_parallel.mesh_of_all`; parameters and the arrays of the loss are then `placed`
        there, and a batch has the windows of this process. None is one device.

    Returns:
      The trained parameters, with `held_out` the best of those that were measured.
    """
    # Only now: orbax is a second of the start of whatever imports this module.
    from moe_jax import training_checkpoints as kept

    optimizer, loss = config.optimizer(), _with_arrays(loss)
    update, windows = _updating(optimizer, config.accumulate, mesh), int(config.accumulate > 1)
    progress = {"parameters": parameters, "state": placed_alike(mesh, optimizer.init, parameters)}
    if held_out is not None:
        nothing = {"least": jnp.asarray(jnp.inf), "stale": jnp.asarray(0)}
        progress |= {"best": parameters, **placed(mesh, nothing)}
    # Closed also when it is interrupted: a checkpoint that is being written is then whole.
    with kept.manager(checkpoints) or nullcontext() as manager:
        start, progress = kept.resumed(manager, progress)
        if start:
            logger.info("resumed at step %d of %d", start, config.steps)
        elif held_out is not None:
            held_out.judge(0, progress)
        log = _Log(config.log_every, on_log)
        for step in range(start, config.steps):
            if held_out is not None and held_out.is_over(progress):
                break
            progress["parameters"], progress["state"], metrics = update(
                loss, progress["parameters"], progress["state"], dealt(mesh, batch(step), windows)
            )
            done, is_last = step + 1, step + 1 == config.steps
            log.add(done, metrics, is_last)
            if held_out is not None and (done % held_out.every == 0 or is_last):
                held_out.judge(done, progress)
            if manager is not None and (done % config.checkpoint_every == 0 or is_last):
                kept.save(manager, done, progress)
    return progress["best" if held_out is not None else "parameters"]


class _Log:
    """Metrics since the last time that something was said of them."""

    def __init__(self, every: int, on_log: OnLog | None) -> None:
        self.every, self.on_log = every, on_log
        self._begin()

    def _begin(self) -> None:
        self.window: list[dict[str, Array]] = []
        self.clock = time.monotonic()

    def add(self, done: int, metrics: dict[str, Array], is_last: bool) -> None:
        """Add a step's metrics, and say the means if it is time."""
        if self.on_log is None:
            return
        self.window.append(metrics)
        if done % self.every == 0 or is_last:
            count = len(self.window)
            means = {key: float(sum(m[key] for m in self.window)) / count for key in metrics}
            means["steps_per_second"] = count / (time.monotonic() - self.clock)
            self.on_log(done, means)
            self._begin()


def _updating(
    optimizer: optax.GradientTransformation, accumulate: int, mesh: Mesh | None
) -> Callable[..., Any]:
    def slope(common, batch):
        loss, parameters = common
        return _gradient(loss, parameters, batch, accumulate)

    mean_slope = averaged(mesh, slope, int(accumulate > 1))

    @jax.jit
    def update(loss, parameters, state, batch):
        gradient, metrics = mean_slope((loss, parameters), batch)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        with jax.numpy_dtype_promotion("standard"):  # Adam raises a float to a whole power
            updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state, metrics

    return update


def _with_arrays(loss: Loss) -> Loss:
    """A loss as a pytree of its arrays."""
    return loss if isinstance(loss, jax.tree_util.Partial) else jax.tree_util.Partial(loss)


def _gradient(
    loss: Loss, parameters: Parameters, batch: Any, accumulate: int
) -> tuple[Parameters, dict[str, Array]]:
    """(gradient, metrics), the means over the batches of a step."""
    slope = jax.grad(loss, has_aux=True)
    if accumulate == 1:
        return slope(parameters, batch)

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, slope(parameters, part)), None

    shapes = jax.eval_shape(slope, parameters, jax.tree.map(lambda leaf: leaf[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda leaf: leaf / accumulate, sums)
