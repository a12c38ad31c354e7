"""Repair of a decoder layer that is taken in groups of its experts.

Sums of a repair are those of single experts, and what the layer lacks is one array that goes from
expert to expert; so a group is all that has to be in memory. A first visit of every group fits each
of its experts alone and adds up what the group gives as it was, as it was pruned and as it is then.
Each round over the experts of the layer is one more visit, the last of which adds up what they give
in the end. So a layer is read once, or 1 + `PASSES` times where its experts make up for each other.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.experts.moe import MoE
from moe_jax.groups import (
    Halfway,
    each_group,
    group_forward,
    halfway_of,
    layer_end,
    own_experts,
    rest_of,
)
from moe_jax.source import LayerSource
from moe_jax.stream import layer_attend
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.scores.routed import Routed, routed
from pruning.scores.states import InSlot, States, temporary_states
from pruning.shrink.progress import LayerArrays
from pruning.shrink.progress import States as TextStates
from pruning.shrink.prune import pruned_layer
from pruning.shrink.repair_choice import (
    RepairedLayer,
    Text,
    chosen,
    errors_at_tokens,
    lacking,
)
from pruning.shrink.repair_layer import Changes, LayerRepair, Ridges, reached
from pruning.shrink.repair_rows import StoredChanges, StoredLayer

SLOTS = 3  # float32 states of the text that lie beside those of the two models
# What the experts of a layer give, in the slot where it lies: that of the dense model has become
# its states behind the layer when the rounds over the experts begin.
PLACES = {"dense": 0, "none": 1, "expert": 2, "layer": 0}


@dataclass(frozen=True, eq=False)
class InGroups:
    """The repair of a model whose layers are taken in groups.

    Attributes:
      source: the dense model.
      plan: what is kept of it.
      texts: to learn from, and held out.
      rounds: over the experts of a layer.
      room: of `Ridges`.
      scratch: folder of what does not fit in memory; default the system's.
    """

    source: LayerSource
    plan: PruningPlan
    texts: tuple[Text, Text]
    rounds: int
    room: int
    scratch: Path | None = None

    @contextmanager
    def layer(
        self, index: int, x: TextStates, as_it_is: bool
    ) -> Iterator[tuple[LayerArrays, RepairedLayer]]:
        """Take both texts through a layer, and repair it.

        Args:
          index: of the layer.
          x: the states of both texts in the dense model, then of both in the repaired one; those
            before the layer become those behind it.
          as_it_is: whether nothing is to be repaired.

        Returns:
          (what to keep of it, what became of it); the former until the block is left.

        Raises:
          FullDiskError: there is no room in the scratch folder.
        """
        with ExitStack() as stack:
            at_work = _Layer(self, index, x, stack)
            if as_it_is:
                at_work.each_group(at_work.run)
                at_work.end("dense", "none")
                yield {}, RepairedLayer(index, "none", 0, 0, 0, {})
                return
            at_work.each_group(at_work.alone)
            at_work.end("dense")
            if self.rounds:
                at_work.together()
            yield at_work.repaired()


class _Layer:
    """A layer while its groups come and go.

    Args:
      work: what it is part of.
      index: of the layer.
      x: as of `InGroups.layer`.
      stack: closes what is held.
    """

    def __init__(self, work: InGroups, index: int, x: TextStates, stack: ExitStack):
        self._work, self._index, self._x, self._stack = work, index, x, stack
        self._ridges = Ridges(work.room)
        self._rest: DecoderLayer | None = None  # what all groups share, once there is one
        self._routed: tuple[Routed, np.ndarray] | None = None  # and tokens at each expert
        self._made: dict[str, StoredLayer] = {}
        self._mendable = self._starved = 0
        windows = [len(text.own.tokens) for text in work.texts]
        shape = (sum(windows), *x[0][0].shape[1:])
        states = stack.enter_context(temporary_states(SLOTS, shape, jnp.float32, work.scratch))
        self._given = {  # by what gives it and text, an array per batch
            (name, number): InSlot(states, slot, [_moved(rows, before) for rows in text.own.rows])
            for name, slot in PLACES.items()
            for number, (text, before) in enumerate(zip(work.texts, (0, windows[0]), strict=True))
        }

    def each_group(self, visit: Callable[[DecoderLayer, DecoderLayer], None]) -> None:
        """Read every group, and visit it and what is left of it when it is pruned."""
        for group in each_group(self._work.source, self._index):
            if self._rest is None:
                self._begin(group)
            visit(group, pruned_layer(self._index, group, self._work.plan))
            del group  # before the next one is read

    def run(self, group: DecoderLayer, pruned: DecoderLayer) -> None:
        """Add what a group gives in both models."""
        self._add("dense", group)
        self._add("none", pruned)

    def alone(self, group: DecoderLayer, pruned: DecoderLayer) -> None:
        """The same, and what it gives with its experts fitted one by one."""
        self.run(group, pruned)
        repair, own = self._repair(group, pruned), own_experts(group)
        self._mendable += int(repair.mendable.sum())
        self._starved += repair.starved
        changes = repair.alone()
        self._take("expert", own, repair.repaired(changes), changes)
        if self._work.rounds:
            self._changes.put(own, changes)

    def together(self) -> None:
        """Fit the experts to what the layer lacks, one after the other and group by group."""
        residual = jnp.asarray(lacking(self._x[0], self._behind("expert", 0)))
        self._zero("layer")
        for number in range(self._work.rounds):

            def visit(group: DecoderLayer, pruned: DecoderLayer, number=number) -> None:
                nonlocal residual
                repair, own = self._repair(group, pruned), own_experts(group)
                changes = self._changes.get(own)
                residual = repair.together(residual, changes)
                self._changes.put(own, changes)
                if number == self._work.rounds - 1:
                    self._take("layer", own, repair.repaired(changes), changes)

            self.each_group(visit)

    def repaired(self) -> tuple[LayerArrays, RepairedLayer]:
        """As of `InGroups.layer`; takes the states of the repaired model behind the layer."""
        held, wanted = self._work.texts[1], self._x[1]
        errors = {
            name: errors_at_tokens(held, wanted, self._behind(name, 1))
            for name in ("none", *self._made)
        }
        choice, said = chosen(errors), {name: float(one.sum()) for name, one in errors.items()}
        self.end(choice)
        made = self._made.get(choice)
        changed = 0 if made is None else made.changed
        about = RepairedLayer(self._index, choice, self._mendable, changed, self._starved, said)
        return {} if made is None or not changed else made.arrays(), about

    def end(self, *names: str) -> None:
        """Take the states behind the layer with what some of its forms have given."""
        for name in names:
            for number in range(len(self._work.texts)):
                states = self._x[_stream(name) + number]
                for i, behind in enumerate(self._behind(name, number)):
                    states[i] = behind

    def _begin(self, group: DecoderLayer) -> None:
        """Do what comes before the experts."""
        self._rest = rest_of(group)
        for text, dense, states in zip(self._work.texts, self._x[:2], self._x[2:], strict=True):
            for x in (dense, states):
                text.own.each(x, lambda x, place, rows: layer_attend(self._rest, x, place))
        for name in ("dense", "none", "expert"):
            self._zero(name)

    def _repair(self, group: DecoderLayer, pruned: DecoderLayer) -> LayerRepair:
        seen, own = self._work.texts[0], own_experts(group)
        if self._routed is None:
            to = routed(group, self._x[2], seen.own.places, seen.rows % 2 == 0)
            self._routed = to, reached(to, seen.spread)
        to, tokens = self._routed
        given = self._keep[own], to.at(own), tokens[own]
        return LayerRepair(group, pruned, *given, self._ridges, seen.spread)

    def _take(self, name: str, own: slice, group: DecoderLayer, changes: Changes) -> None:
        """Keep a group that was repaired, and add what it gives."""
        assert isinstance(group.mlp, MoE)
        experts = group.mlp.experts
        if name not in self._made:
            dtype = experts.w_down.dtype
            self._made[name] = StoredLayer(self._keep, self._states(dtype))
        self._made[name].put(own, experts, len(changes))
        self._add(name, group)

    @cached_property
    def _keep(self) -> np.ndarray:  # bool [E, F]
        return self._work.plan.keep[self._work.plan.layer_indices.index(self._index)]

    @cached_property
    def _changes(self) -> StoredChanges:
        return StoredChanges(self._keep, self._states(jnp.float32, len(self._keep)))

    def _states(self, dtype: Any, more: int = 0) -> States:
        """For a row of every kept channel, and some more."""
        shape = int(self._keep.sum()) + more, self._work.source.config.d_model
        return self._stack.enter_context(temporary_states(1, shape, dtype, self._work.scratch))

    def _zero(self, name: str) -> None:
        """Nothing has been given so far."""
        for number, x in enumerate(self._x[:2]):
            for i, part in enumerate(x):
                self._given[name, number][i] = np.zeros(part.shape, np.float32)

    def _add(self, name: str, group: DecoderLayer) -> None:
        """Add what the experts of a group give."""
        for number, text in enumerate(self._work.texts):
            for i, place in enumerate(text.own.places):
                given = group_forward(group, self._halfway(name, number, i), place)
                self._given[name, number][i] = np.asarray(given)

    def _behind(self, name: str, number: int) -> Iterator[np.ndarray]:  # [b, T, D]
        """What stands behind the layer, a batch of a text at a time."""
        for i in range(len(self._work.texts[number].own.rows)):
            yield np.asarray(layer_end(self._rest, self._halfway(name, number, i)))

    def _halfway(self, name: str, number: int, batch: int) -> Halfway:
        # As a whole layer is begun here, its middle is rounded to the states' dtype.
        middle = jnp.asarray(self._x[_stream(name) + number][batch])
        return halfway_of(middle, jnp.asarray(self._given[name, number][batch]))


def _stream(name: str) -> int:
    """The first of the states, see `InGroups.layer`, of the model that something is given in."""
    return 0 if name == "dense" else 2


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
