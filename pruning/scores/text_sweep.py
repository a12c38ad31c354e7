"""The sweep that collects every statistic: each layer once upwards, for gradients once downwards.

All windows go through a layer while it is held, and their sums stay apart by part of the text.
Between two steps the hidden states lie in slots, of which a step overwrites none that it reads, so
that one which was killed can be done again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.config import ModelConfig
from moe_jax.mesh import ROWS, SUMS
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource, sweep
from moe_jax.transformer import DecoderLayer
from pruning.kit.progress import OnStep, counter
from pruning.scores.details import add_details, wanda_sums
from pruning.scores.grouped import Text, statistics_in_groups
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

EDGES = 2  # slots that hold what one step leaves to the next, in turns
# What is made of the norms of experts' inputs, plain or times the routing weight, by their squares.
WANDA = {
    "input_square": ("wanda_up", "wanda_gate"),
    "weighted_input_square": ("routed_wanda_up", "routed_wanda_gate"),
}


@dataclass(frozen=True)
class Asked:
    """What a sweep collects beyond the forward sums.

    Attributes:
      gradients: sums of the end-to-end next-token loss, by a way down.
      expert_details: vectors per expert and pairs of experts.
      each_prefix: what needs the whole text, for every number of parts instead.
    """

    gradients: bool = False
    expert_details: bool = False
    each_prefix: bool = False

    @property
    def groups(self) -> tuple[str, ...]:
        """Their names in `ChannelStatistics`."""
        asked = (("gradients", self.gradients), ("expert-details", self.expert_details))
        return tuple(name for name, on in asked if on)

    def slots(self, config: ModelConfig) -> int:
        """States of the text that are alive at once."""
        return EDGES + (layer_slots(config) if self.gradients else 0)

    def steps(self, config: ModelConfig) -> int:
        """Steps of the sweep: layers upwards, the loss, layers downwards."""
        layers, lowest = config.num_layers, config.moe_layers[0]
        return layers + (1 + layers - lowest if self.gradients else 0)


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
        # What else is asked for takes all experts of a layer together, and so do several devices.
        plain = not self.asked.groups and self._spread.mesh is None
        sweep(
            self.source, None, self._up, layers=layers, on_layer=lambda _: self._count(1),
            in_groups=self._up_in_groups if plain else None,
        )  # fmt: skip

    def backward(self) -> None:
        """Go down through the layers that are left, if gradients are asked for."""
        if not self.asked.gradients:
            return
        top = len(self.source)
        if self.log.done == top:
            self._loss()
        # Below the lowest layer with experts nothing is scored.
        layers = reversed(range(self.source.config.moe_layers[0], 2 * top + 1 - self.log.done))
        sweep(self.source, None, self._down, layers=layers, on_layer=lambda _: self._count(1))

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
        batches = self.text.batches
        for number, (rows, place) in enumerate(zip(batches.rows, batches.places, strict=True)):
            before = self._entering(index, rows)
            visit = None if slot is None else slot * len(batches.rows) + number
            keep = visit is not None and self._projections.has_room(visit)
            middle, out, found, kept = self._statistics(keep)(here, before, place)
            if keep:
                self._projections.keep(index, rows, kept)
            for part, batch in self._by_part(number, found) if slot is not None else ():
                add_batch(sums, part, batch, facts["down_norm"][0])
            if self.asked.expert_details and slot is not None:
                apart = self._spread.apart((middle, out, place))
                for part, batch in zip(self._owners(number), apart, strict=False):
                    add_details(sums, part, layer, *batch)
            self._leave(index, rows, middle, out)
        sums = self._spread.total(sums)
        if self.asked.expert_details and slot is not None:
            self._add_wanda(sums, layer)
        self._end_step(sums | facts)

    def _up_in_groups(self, index: int, _: None) -> None:
        text = Text(
            self.text,
            lambda rows: self._entering(index, rows),
            lambda rows, out: self._leave(index, rows, out, out),
            self._dtype,
        )
        sums, facts = statistics_in_groups(self.source, index, text, self._own, self._scratch)
        self._end_step(self._spread.total(sums) | facts)

    def _statistics(self, keep: bool) -> Any:
        out = (ROWS, ROWS, SUMS, ROWS)
        return self._spread.each(layer_statistics, out, keep=keep, own=self._own)

    def _no_sums(self, layer: DecoderLayer) -> Sums:
        d_model, parts = self.source.config.d_model, len(self.text.tokens)
        sums = no_sums(layer, d_model, parts, self.asked.groups)
        if self.asked.expert_details and not self._spread.leads:
            # That of the first batch of all, which process 0 has.
            experts = self.source.config.moe.num_experts
            sums["similarity"] = np.zeros((1, experts, experts))
        return sums

    def _add_wanda(self, sums: Sums, layer: DecoderLayer) -> None:
        """Add what needs the norms of the experts' inputs over the whole text."""
        for square, names in WANDA.items():
            prefixes = np.cumsum(sums[square], axis=0)
            wanted = prefixes if self.asked.each_prefix else prefixes[-1:]
            pairs = [wanda_sums(layer, one) for one in wanted]
            for name, values in zip(names, zip(*pairs, strict=True), strict=True):
                sums[name] = np.stack(values).astype(np.float64)

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
        states, slot = self._open_states, self._slots.get(index)
        lowest, edge = self.source.config.moe_layers[0], self._edge
        given = edge + (len(self.source) - index) % EDGES  # by the step before
        sums = {} if slot is None else no_gradient_sums(layer, len(self.text.tokens))
        here, batches = self._spread.everywhere(layer), self.text.batches
        through_experts = self._spread.each(feed_forward_backward, (ROWS, SUMS))
        through_attention = self._spread.each(attention_backward, ROWS)
        for number, (rows, place) in enumerate(zip(batches.rows, batches.places, strict=True)):
            x, middle = (self._spread.dealt(states.get(2 * index + i, rows)) for i in (0, 1))
            kept = self._kept(index, here, x, place, number)
            d_out = self._spread.dealt(states.get(given, rows))
            d_middle, scores = through_experts(here, middle, place, d_out, kept)
            for part, batch in self._by_part(number, scores, 1) if scores is not None else ():
                values = batch.astype(np.float64)
                for name, value in zip(GRADIENT_SCORES, values, strict=True):
                    sums[name][part] += value
            if index > lowest:
                left = 2 * edge + 1 - given  # the other one
                states.put(left, rows, through_attention(here, x, place, d_middle))
        self._end_step(self._spread.total(sums))

    def _kept(
        self, index: int, layer: DecoderLayer, x: Array, place: Context, number: int
    ) -> Kept | None:
        """What the way up kept of a batch; made again, by the same program, if it had no room or
        was in a process that is gone."""
        batches, slot = self.text.batches, self._slots.get(index)
        if slot is None or not self._projections.has_room(slot * len(batches.rows) + number):
            return None
        kept = self._projections.take(index, batches.rows[number])
        if kept is not None:
            return self._spread.dealt(kept)
        return self._statistics(keep=True)(layer, x, place)[3]

    # --- both ---

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
