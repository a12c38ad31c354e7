"""What a training of a student is: its text, its schedule, and who shares each batch."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from moe_jax.data_parallel import mesh_of_all
from moe_jax.spread import ALONE, Spread
from moe_jax.training import HeldOut, TrainingConfig
from pruning.recovery.deltas import DeltaConfig

ROUTER_SIZE = 0.05  # root mean square of a router's weights from which it has the rate of experts


@dataclass(frozen=True, eq=False)
class TrainingText:
    """Windows of text, and what the teacher says of them; of several processes each has some.

    Attributes:
      tokens: int32 [B, T].
      valid: bool [B, T].
      wanted: bool [B, T], positions whose prediction counts.
      predictions: [B, T] of `teacher.prediction_type`, on disk or in memory; None without teacher.
      first: number of the first of these windows among those of all processes.
      counts: int, positions whose prediction counts of each window of all processes; None where
        these are all windows.
    """

    tokens: np.ndarray
    valid: np.ndarray
    wanted: np.ndarray
    predictions: np.ndarray | None = None
    first: int = 0
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        """Windows of all processes."""
        return len(self.tokens if self.counts is None else self.counts)

    @property
    def spent(self) -> np.ndarray:
        """Positions whose prediction counts, of each window of all processes."""
        return self.wanted.sum(1) if self.counts is None else self.counts

    def rows(self, chosen: np.ndarray | slice) -> dict[str, np.ndarray]:
        """Some of this process's windows as `student_loss` takes them, but for count and share."""
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
      epochs: times that every window is seen; of a text of few batches some once more or less.
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

    def share_at(self, progress: float) -> float:
        """Share of the next-token loss, of progress from 0 to 1."""
        return self.share_from + progress * (self.share_to - self.share_from)

    def chosen(self, step: int, windows: int) -> np.ndarray:
        """Windows of a step, int [accumulate, batch].

        Each place of a batch has a part of the text of its own, `part_of`, in an order that each
        epoch changes: who has some places of all batches needs those parts alone.
        """
        found = np.empty((self.accumulate, self.batch), int)
        for place in range(self.batch):
            part = part_of(place, self.batch, windows)
            for number in range(self.accumulate):
                epoch, turn = divmod(step * self.accumulate + number, len(part))
                order = np.random.default_rng((self.seed, epoch, place)).permutation(len(part))
                found[number, place] = part[order[turn]]
        return found


def part_of(place: int, batch: int, windows: int) -> range:
    """The windows that one place of all batches draws from; neighbours have those beside."""
    first = place * windows // batch
    return range(first, max(first + 1, (place + 1) * windows // batch))


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
      spread: devices and processes that share every batch.
    """

    text: TrainingText
    held: TrainingText
    config: DeltaConfig
    options: FitOptions
    checkpoints: Path | None = None
    on_step: Callable[[int, int], None] | None = None
    spread: Spread = ALONE

    @cached_property
    def mesh(self) -> Mesh | None:
        """All devices that share the work."""
        return mesh_of_all(self.spread)

    @property
    def places(self) -> int:
        """Devices of all processes that windows are dealt to."""
        return self.spread.processes * self.spread.devices

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

    def begin(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """A step begins.

        Returns:
          (its windows among all, int [accumulate, batch]; among those of the text here, int
          [accumulate * batch / processes]).
        """
        if self.on_step:
            self.on_step(step, self.schedule.steps)
        chosen = self.options.chosen(step, len(self.text))
        own = self.spread.in_a_row(self.options.batch)
        return chosen, (chosen[:, own.start : own.stop] - self.text.first).reshape(-1)

    @property
    def rows(self) -> int:
        """Windows of every batch that are this process's."""
        return self.options.batch // self.spread.processes

    def count(self, chosen: np.ndarray) -> np.ndarray:
        """By what each device divides its sums over positions that count, float32, an entry for
        each batch of a step: means of means then count all positions of a step alike.

        Args:
          chosen: windows of the step, int [accumulate, batch].
        """
        accumulate = self.options.accumulate
        shape = () if accumulate == 1 else (accumulate,)
        each = max(1, int(self.text.spent[chosen].sum())) / (accumulate * self.places)
        return np.full(shape, each, np.float32)

    def held_parts(self) -> Iterator[slice]:
        """Batches of the windows held out here, as many as any process has; some may be empty."""
        most = -(-len(self.held) // self.spread.processes)
        return (slice(start, start + self.rows) for start in range(0, most, self.rows))

    def judge(self, loss: Callable[[int, Any], float]) -> HeldOut | None:
        """A held-out loss that says which changes are the best."""
        return HeldOut(loss, self.schedule.log_every, self.options.patience) if self.held else None


def own_part(spread: Spread, batch: int, windows: int) -> range:
    """The windows of a text that this process has, if `spread` shares batches of so many."""
    own = spread.in_a_row(batch)
    return range(
        part_of(own.start, batch, windows).start, part_of(own.stop - 1, batch, windows).stop
    )


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


def filled_rows(values: np.ndarray, count: int) -> np.ndarray:
    """Append zero rows up to so many."""
    return np.concatenate(
        [values, np.zeros((count - len(values), *values.shape[1:]), values.dtype)]
    )
