"""Training a student that fits in memory end to end, on windows of text."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.experts.moe import MoE
from moe_jax.stream import pad_rows
from moe_jax.training import HeldOut, TrainingConfig, train
from moe_jax.transformer import Transformer
from pruning.recovery.deltas import DeltaConfig, Deltas, init_deltas
from pruning.recovery.forward import student_loss, window_losses

ROUTER_SIZE = 0.05  # root mean square of a router's weights from which it has the rate of experts


@dataclass(frozen=True, eq=False)
class TrainingText:
    """Windows of text, and what the teacher says of them.

    Attributes:
      tokens: int32 [B, T].
      valid: bool [B, T].
      wanted: bool [B, T], positions whose prediction counts.
      predictions: [B, T] of `teacher.prediction_type`, on disk or in memory; None without teacher.
    """

    tokens: np.ndarray
    valid: np.ndarray
    wanted: np.ndarray
    predictions: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, chosen: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Some windows as `student_loss` takes them, but for count and share."""
        found = {name: getattr(self, name)[chosen] for name in ("tokens", "valid", "wanted")}
        if self.predictions is not None:
            kept = self.predictions[chosen]
            found |= {"logp": np.array(kept["logp"]), "token": np.array(kept["token"])}
        return found


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """How a student is trained.

    Attributes:
      learning_rate: of the experts' changes, or of the router's where it is trained alone.
      router_rate, attention_rate: of their changes, as multiples of it. None, of routers, is 1 but
        for those of small weights, see `router_share`.
      epochs: times that every window is seen.
      batch: windows whose gradient is taken at once.
      accumulate: such batches per step.
      warmup: share of the steps in which the learning rate rises.
      clip: largest norm of a gradient.
      share_from, share_to: of the next-token loss at the first step and at the last; the rest is
        the divergence from the teacher.
      balance: factor of the load-balance loss.
      patience: measurements without a better held-out loss that end the run; None for never.
      measurements: of the held-out loss, in all.
      seed: of the order of windows and of what adapters begin with.
      dtype: of the activations.
      remat: compute layers twice instead of keeping what is in them.
    """

    learning_rate: float
    router_rate: float | None = None
    attention_rate: float = 0.5
    epochs: int = 1
    batch: int = 8
    accumulate: int = 1
    warmup: float = 0.1
    clip: float = 0.5
    share_from: float = 0.0
    share_to: float = 0.0
    balance: float = 0.0
    patience: int | None = None
    measurements: int = 10
    seed: int = 0
    dtype: Any = jnp.float32
    remat: bool = True

    def schedule(self, windows: int) -> TrainingConfig:
        """The schedule for a text of so many windows: AdamW, warm-up, cosine to zero, clipping."""
        steps = max(1, -(-self.epochs * windows // (self.batch * self.accumulate)))
        every = max(1, steps // self.measurements)
        return TrainingConfig(
            steps=steps,
            learning_rate=self.learning_rate,
            warmup_steps=min(round(self.warmup * steps), steps - 1),
            weight_decay=0.0,
            clip_norm=self.clip,
            checkpoint_every=every,
            log_every=every,
            b2=0.999,
            end_rate=0.0,
            accumulate=self.accumulate,
            group_rates={"router": self.router_rate or 1.0, "attention": self.attention_rate},
        )

    def parts(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A step's windows; where several batches make a step, batch by batch."""
        if self.accumulate == 1:
            return rows
        return {n: v.reshape(self.accumulate, -1, *v.shape[1:]) for n, v in rows.items()}

    def chosen(self, step: int, windows: int) -> np.ndarray:
        """Windows of a step, int [batch * accumulate]: each epoch has an order of its own."""
        size = self.batch * self.accumulate
        places = np.arange(step * size, (step + 1) * size)
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(windows)
            for epoch in np.unique(places // windows).tolist()
        }
        return np.array([orders[place // windows][place % windows] for place in places.tolist()])


@dataclass(frozen=True, eq=False)
class Course:
    """One training, end to end or of layers: on what, of which weights, and how.

    Attributes:
      text: to train on.
      held: to measure on; without windows the last changes are taken for the best.
      config: which weights change.
      options: how.
      checkpoints: folder of orbax checkpoints, from which an interrupted training goes on; None
        keeps nothing.
      on_step: called with the steps begun and the steps in all.
    """

    text: TrainingText
    held: TrainingText
    config: DeltaConfig
    options: FitOptions
    checkpoints: Path | None = None
    on_step: Callable[[int, int], None] | None = None

    @property
    def schedule(self) -> TrainingConfig:
        """The schedule for its text."""
        return self.options.schedule(len(self.text))

    def schedule_of(self, routers: Mapping[str, Array] | Array) -> TrainingConfig:
        """The schedule of the layers whose routers these are, by their key among the changes."""
        if self.options.router_rate is not None:
            return self.schedule
        rates = {**self.schedule.group_rates, "router": jax.tree.map(router_share, routers)}
        return dataclasses.replace(self.schedule, group_rates=rates)

    def chosen(self, step: int) -> np.ndarray:
        """Windows of a step that begins."""
        if self.on_step:
            self.on_step(step, self.schedule.steps)
        return self.options.chosen(step, len(self.text))

    def judge(self, loss: Callable[[int, Any], float]) -> HeldOut | None:
        """A held-out loss that says which changes are the best."""
        return HeldOut(loss, self.schedule.log_every, self.options.patience) if self.held else None


def router_share(router: Array) -> float:
    """The rate of a router beside that of experts: less where its weights are small, since a step
    would else turn all of its choices over.

    Args:
      router: [E, D].

    Returns:
      Root mean square of the weights over `ROUTER_SIZE`, at most 1.
    """
    size = float(jnp.sqrt(jnp.mean(jnp.square(router.astype(jnp.float32)))))
    return min(1.0, size / ROUTER_SIZE)


def first_deltas(model: Transformer, config: DeltaConfig, seed: int) -> Deltas:
    """Changes of all layers that change nothing yet."""
    keys = jax.random.split(jax.random.key(seed), len(model.layers))
    found: Deltas = {}
    for index, (layer, key) in enumerate(zip(model.layers, keys, strict=True)):
        for group, part in init_deltas(layer, config, key).items():
            found.setdefault(group, {})[str(index)] = part
    return found


def fit(
    model: Transformer,
    course: Course,
    *,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
    on_held_out: Callable[[int, dict[str, float]], None] | None = None,
) -> Deltas:
    """Train changes of a student; a run that was interrupted goes on from its checkpoints.

    Args:
      model: the student, in memory; where it rounds, `rounded` already.
      course: the training.
      on_log: receives (step, mean metrics since the last time).
      on_held_out: receives (step, nats per token on `held`: "loss", "nll", "kl"), 0 first.

    Returns:
      The changes with the least held-out loss.
    """
    config, options = course.config, course.options
    schedule = course.schedule_of(
        {str(i): layer.mlp.router for i, layer in enumerate(model.layers)
         if isinstance(layer.mlp, MoE)}
    )  # fmt: skip
    how = partial(
        student_loss,
        config=config,
        balance=options.balance,
        dtype=options.dtype,
        remat=options.remat,
    )

    def batch(step: int) -> dict[str, Any]:
        rows = course.text.rows(course.chosen(step))
        return _step_batch(rows, options, step / max(1, schedule.steps - 1))

    def measured(step: int, deltas: Deltas) -> float:
        found = held_out_losses(model, deltas, course.held, config, options)
        if on_held_out:
            on_held_out(step, found)
        return found["loss"]

    return train(
        first_deltas(model, config, options.seed),
        jax.tree_util.Partial(how, model),
        batch,
        schedule,
        checkpoints=course.checkpoints,
        on_log=on_log,
        held_out=course.judge(measured),
    )


def held_out_losses(
    model: Transformer,
    deltas: Deltas,
    text: TrainingText,
    config: DeltaConfig,
    options: FitOptions,
) -> dict[str, float]:
    """Nats per predicted token of a text: "nll", with a teacher "kl", and their mixture "loss"."""
    sums: dict[str, float] = {}
    for start in range(0, len(text), options.batch):
        rows = text.rows(slice(start, start + options.batch))
        part = {name: pad_rows(value, options.batch) for name, value in rows.items()}
        part |= {"count": np.float32(1), "share": np.float32(options.share_to)}
        found = window_losses(model, deltas, part, config, options.dtype)
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {name: value / max(1, int(text.wanted.sum())) for name, value in sums.items()}


def _step_batch(
    rows: dict[str, np.ndarray], options: FitOptions, progress: float
) -> dict[str, Any]:
    """A step's windows, in as many parts as are accumulated; all its tokens count alike."""
    parts = options.accumulate
    shape = () if parts == 1 else (parts,)
    share = options.share_from + progress * (options.share_to - options.share_from)
    count = max(1, rows["wanted"].sum()) / parts
    return options.parts(rows) | {
        "count": np.full(shape, count, np.float32),
        "share": np.full(shape, share, np.float32),
    }
