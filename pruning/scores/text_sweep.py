"""The sweep that collects every statistic: each layer once upwards, for gradients once downwards.

All windows go through a layer while it is held, and their sums stay apart by part of the text.
Between two steps the hidden states lie in slots, of which a step overwrites none that it reads, so
that one which was killed can be done again.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.mesh import ROWS, SUMS
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource, sweep
from moe_jax.transformer import DecoderLayer
from pruning.kit.progress import OnStep, counter
from pruning.scores.asked import EDGES, Asked
from pruning.scores.details import add_details, add_wanda
from pruning.scores.elimination import SampledCosts
from pruning.scores.grouped import Text, statistics_in_groups
from pruning.scores.grouped_gradients import WayDown, gradients_in_groups
from pruning.scores.layer import (
    GRADIENT_SCORES,
    Kept,
    attention_backward,
    batch_words,
    feed_forward_backward,
    layer_statistics,
    loss_and_gradient,
)
from pruning.scores.layer_sums import add_batch, layer_facts, no_gradient_sums, no_sums
from pruning.scores.own import STATISTICS
from pruning.scores.parts import Parts
from pruning.scores.states import Projections, States, layer_slots, projection_room
from pruning.scores.statistics import DECLARED, ChannelStatistics
from pruning.scores.sweep_log import Sums, SweepLog
from pruning.scores.weight_facts import slots_of


class TextSweep:
    """A sweep over a text in parts.

    Args:
      source: the dense model; at most two of its layers, or of its groups of experts, are held.
      text: the windows.
      asked: what is collected.
      dtype: of the activations; sums are float32 inside a batch, float64 across batches.
      states: `asked.slots` of the text; None if the log holds all steps.
      log: where the sums go; what it has already is not done again.
      on_step: receives (layer visits done, layer visits in all).
      spread: the devices, and the processes that share the text: each gives its windows, and has
        the sums of all.
      scratch: folder of what lies beside the states while a layer is taken in groups of experts,
        where that does not fit in memory; default the system's.
    """

    def __init__(
        self,
        source: LayerSource,
        text: Parts,
        asked: Asked,
        dtype,
        states: States | None,
        log: SweepLog,
        on_step: OnStep | None = None,
        spread: Spread = ALONE,
        scratch: Path | None = None,
    ):
        self.source, self.text, self.asked, self.log = source, text, asked, log
        self._spread, self._scratch = spread, scratch
        self._dtype, self._states = dtype, states
        self._slots, self._own = slots_of(source), tuple(STATISTICS.items())
        batches, c = text.batches, source.config
        self._edge = layer_slots(c) if asked.gradients else 0  # the first of `EDGES`
        step = batches.tokens[batches.rows[0]].size
        # Of devices that share the experts each has rows of its own, which are not kept.
        keeps = asked.gradients and spread.parts == 1
        room = projection_room(c, len(batches.rows), step) if keeps else 0
        self._projections = Projections(room)
        self._count = counter(asked.steps(c) - asked.gradients, on_step)  # the loss reads no layer
        if log.done:
            self._count(log.done - (log.done > len(source)))

    def forward(self) -> None:
        """Go up through the layers that are left."""
        layers = range(min(self.log.done, len(self.source)), len(self.source))
        self._sweep(layers, self._up, self._up_in_groups)

    def backward(self) -> None:
        """Go down through the layers that are left, if gradients are asked for."""
        if not self.asked.gradients:
            return
        top = len(self.source)
        if self.log.done == top:
            self._loss()
        # Below the lowest layer with experts nothing is scored.
        layers = reversed(range(self.source.config.moe_layers[0], 2 * top + 1 - self.log.done))
        self._sweep(layers, self._down, self._down_in_groups)

    def part(self, number: int) -> ChannelStatistics:
        """Statistics of one part, without what needs the whole text."""
        arrays = {name: a for name, a in self._arrays(number).items() if not _is_finished(name)}
        arrays["total_tokens"] = np.array(float(self.text.tokens[number]))
        if self.asked.gradients:
            arrays |= self.log.rows(len(self.source), number)
        return ChannelStatistics.from_arrays(arrays)

    def finished(self, total: ChannelStatistics, parts: int) -> ChannelStatistics:
        """Statistics of the first so many parts, with what needs the whole of them."""
        arrays = self._arrays(parts - 1).items()
        finished = {name: a for name, a in arrays if _is_finished(name)}
        return total.replace(**finished)  # type: ignore[attr-defined]

    def _arrays(self, number: int) -> Sums:
        """What all layers have of a part, [L, ...]."""
        found: Sums = {}
        top = len(self.source)
        for index, slot in self._slots.items():
            for step in (index, 2 * top - index) if self.asked.gradients else (index,):
                for name, value in self.log.rows(step, number).items():
                    found.setdefault(name, np.zeros((len(self._slots), *value.shape)))[slot] = value
        return found

    # --- upwards ---

    def _up(self, index: int, layer: DecoderLayer, _: None) -> None:
        slot, here = self._slots.get(index), self._spread.everywhere(layer)
        facts = {} if slot is None else layer_facts(layer)
        sums = {} if slot is None else self._no_sums(layer)
        obs = slot is not None and self.asked.obs
        costs = SampledCosts(layer, self.text, self._spread) if obs else None
        batches = self.text.batches
        for number, (rows, place) in enumerate(zip(batches.rows, batches.places, strict=True)):
            before = self._entering(index, rows)
            keep = self._is_kept(index, number)
            middle, out, found, kept, seen = self._statistics(keep)(here, before, place)
            if keep:
                self._projections.keep(index, rows, kept)
            for part, batch in self._by_part(number, found) if slot is not None else ():
                add_batch(sums, part, batch, facts["down_norm"][0])
            if self.asked.expert_details and slot is not None:
                apart = self._spread.apart((middle, out, place))
                for part, batch in zip(self._owners(number), apart, strict=False):
                    add_details(sums, part, layer, *batch)
            if costs is not None:
                costs.add(rows, seen)
            self._leave(index, rows, middle, out)
        sums = self._spread.total(sums)
        if self.asked.expert_details and slot is not None:
            add_wanda(sums, layer, self.asked.each_prefix)
        if costs is not None:
            facts["elimination"] = costs.found(sums["energy"], facts["down_norm"][0])
        self._end_step(sums | facts)

    def _up_in_groups(self, index: int, _: None) -> None:
        text = Text(
            self.text,
            lambda rows: self._entering(index, rows),
            lambda rows, middle, out: self._leave(index, rows, middle, out),
            self._dtype,
            self.asked.obs,
        )
        sums, facts = statistics_in_groups(
            self.source, index, text, self._own, self._scratch, self._spread
        )
        self._end_step(sums | facts)

    def _statistics(self, keep: bool) -> Any:
        out = (ROWS, ROWS, SUMS, ROWS, ROWS)
        rows = self.asked.obs
        return self._spread.each(layer_statistics, out, keep=keep, own=self._own, rows=rows)

    def _no_sums(self, layer: DecoderLayer) -> Sums:
        d_model, parts = self.source.config.d_model, len(self.text.tokens)
        sums = no_sums(layer, d_model, parts, self.asked.groups)
        if self.asked.expert_details and not self._spread.leads:
            # That of the first batch of all, which process 0 has.
            experts = self.source.config.moe.num_experts
            sums["similarity"] = np.zeros((1, experts, experts))
        return sums

    def _entering(self, index: int, rows: slice) -> Array:
        """What enters a layer on the way up."""
        states, edge = self._open_states, self._edge
        if index == 0:
            first = self.source.embedding(self.text.batches.tokens[rows], self._dtype)
            if self.asked.gradients:
                states.put(0, rows, first)
            return self._spread.dealt(first)
        slot = 2 * index if self.asked.gradients else edge + (index - 1) % EDGES
        return self._spread.dealt(states.get(slot, rows))

    def _leave(self, index: int, rows: slice, middle: Array, out: Array) -> None:
        """Keep what the layers above need, and the way down."""
        states, is_last = self._open_states, index == len(self.source) - 1
        if self.asked.gradients:
            states.put(2 * index + 1, rows, middle)
            states.put(self._edge if is_last else 2 * (index + 1), rows, out)
        elif not is_last:
            states.put(self._edge + index % EDGES, rows, out)

    # --- downwards ---

    def _loss(self) -> None:
        """Begin the way down: gradients of the loss at the last hidden states."""
        batches, losses = self.text.batches, np.zeros(len(self.text.tokens))
        head = self._spread.everywhere(self.source.head)
        loss_of = self._spread.each(loss_and_gradient, (SUMS, ROWS))
        for number, rows in enumerate(batches.rows):
            x = self._spread.dealt(self._open_states.get(self._edge, rows))
            words = self._spread.dealt(batch_words(batches, rows))
            found, gradient = loss_of(head, x, *words)
            for part, loss in self._by_part(number, found):
                losses[part] += float(loss)
            self._open_states.put(self._edge + 1, rows, gradient)
        self._end_step(self._spread.total({"loss_sum": losses}))

    def _down(self, index: int, layer: DecoderLayer, _: None) -> None:
        slot = self._slots.get(index)
        sums = {} if slot is None else no_gradient_sums(layer, len(self.text.tokens))
        lowest = self.source.config.moe_layers[0]
        here, batches = self._spread.everywhere(layer), self.text.batches
        through_experts = self._spread.each(feed_forward_backward, (ROWS, SUMS))
        through_attention = self._spread.each(attention_backward, ROWS)
        for number, (rows, place) in enumerate(zip(batches.rows, batches.places, strict=True)):
            x, middle = self._entered(index, rows), self._middle(index, rows)
            kept = self._kept(index, here, x, place, number)
            d_out = self._given(index, rows)
            d_middle, scores = through_experts(here, middle, place, d_out, kept)
            for part, batch in self._by_part(number, scores, 1) if scores is not None else ():
                values = batch.astype(np.float64)
                for name, value in zip(GRADIENT_SCORES, values, strict=True):
                    sums[name][part] += value
            if index > lowest:
                self._pass_down(index, rows, through_attention(here, x, place, d_middle))
        self._end_step(self._spread.total(sums))

    def _down_in_groups(self, index: int, _: None) -> None:
        rounds = jnp.dtype(self._dtype) != jnp.float32
        lowest = self.source.config.moe_layers[0]
        text = WayDown(
            self.text,
            entered=lambda rows: self._entered(index, rows),
            middle=lambda rows: self._middle(index, rows),
            given=lambda rows: self._given(index, rows),
            leave=partial(self._pass_down, index) if index > lowest else None,
            as_seen=lambda number: rounds and self._is_kept(index, number),
        )
        sums = gradients_in_groups(self.source, index, text, self._scratch)
        self._end_step(self._spread.total(sums))

    def _kept(
        self, index: int, layer: DecoderLayer, x: Array, place: Context, number: int
    ) -> Kept | None:
        """What the way up kept of a batch; made again, by the same program, if it had no room or
        was in a process that is gone."""
        if not self._is_kept(index, number):
            return None
        kept = self._projections.take(index, self.text.batches.rows[number])
        if kept is not None:
            return self._spread.dealt(kept)
        return self._statistics(keep=True)(layer, x, place)[3]

    def _is_kept(self, index: int, number: int) -> bool:
        """Whether the way up keeps the rows of a batch in a layer, or would if it had room."""
        slot = self._slots.get(index)
        if slot is None:
            return False
        return self._projections.has_room(slot * len(self.text.batches.rows) + number)

    def _entered(self, index: int, rows: slice) -> Array:
        """What entered a layer on the way up."""
        return self._spread.dealt(self._open_states.get(2 * index, rows))

    def _middle(self, index: int, rows: slice) -> Array:
        """What stood behind its attention."""
        return self._spread.dealt(self._open_states.get(2 * index + 1, rows))

    def _given(self, index: int, rows: slice) -> Array:
        """The gradient at its output, which the step before left."""
        slot = self._edge + (len(self.source) - index) % EDGES
        return self._spread.dealt(self._open_states.get(slot, rows))

    def _pass_down(self, index: int, rows: slice, gradient: Array) -> None:
        """Leave the gradient at what entered a layer to the one below."""
        slot = self._edge + (len(self.source) - index + 1) % EDGES
        self._open_states.put(slot, rows, gradient)

    # --- both ---

    def _sweep(self, layers: Iterable[int], step: Any, in_groups: Any) -> None:
        # Details take all experts of a layer together, and so do several devices.
        plain = not self.asked.expert_details and self._spread.mesh is None
        sweep(
            self.source, None, step, layers=layers, on_layer=lambda _: self._count(1),
            in_groups=in_groups if plain else None,
        )  # fmt: skip

    def _owners(self, number: int) -> tuple[int, ...]:
        """Parts of the batches of a step, one per device but for padding."""
        devices = self._spread.devices
        return self.text.owner[number * devices : (number + 1) * devices]

    def _by_part(self, number: int, found: Any, axis: int = 0) -> Iterator[tuple[int, Any]]:
        """The sums of a step's batches, experts along an axis, with the part of each."""
        experts = self.source.config.moe.num_experts
        batches = self._spread.by_batch(found, experts, axis)
        return zip(self._owners(number), batches, strict=False)

    @property
    def _open_states(self) -> States:
        assert self._states is not None
        return self._states

    def _end_step(self, sums: Sums) -> None:
        self._open_states.sync()
        self.log.add(sums)


def _is_finished(name: str) -> bool:
    return name in DECLARED and DECLARED[name]["kind"] == "finished"
