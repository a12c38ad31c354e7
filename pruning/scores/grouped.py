"""Statistics of a layer that is taken in groups of its experts.

They weigh what an expert gives by what all give together, which is known once every group has run.
So each group is taken twice, upwards for the output of the layer and back down for the sums; the
last one stays in between. A layer of G groups is read 2 - 1 / G times.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.moe import MoE
from moe_jax.groups import (
    Between,
    Halfway,
    group_trace,
    keep,
    layer_begin,
    layer_end,
    own_experts,
    rest_of,
    taken,
)
from moe_jax.source import LayerSource, group_of, groups_of
from moe_jax.spread import ALONE, Spread
from moe_jax.transformer import DecoderLayer
from pruning.scores.elimination import SampledCosts
from pruning.scores.expert_sums import observe_experts, observed_group
from pruning.scores.grams import GramRows, gram_rows
from pruning.scores.layer import block_sums, expert_sums, token_weights
from pruning.scores.layer_sums import add_batch, layer_facts, no_sums
from pruning.scores.own import Own
from pruning.scores.parts import Parts
from pruning.scores.states import InSlot, temporary_states
from pruning.scores.sweep_log import Sums

SLOTS = 2  # float32 states of the text that lie beside those of the sweep


@dataclass(frozen=True)
class Text:
    """A text on its way through a layer.

    Attributes:
      parts: its batches.
      entering: rows of a batch -> its states before the layer, [b, T, D].
      leave: takes the rows of a batch and its states behind the attention and behind the layer.
      dtype: of the states.
      obs: whether what channels cost once others have taken over is found, too.
    """

    parts: Parts
    entering: Callable[[slice], Array]
    leave: Callable[[slice, Array, Array], None]
    dtype: Any
    obs: bool = False


def statistics_in_groups(
    source: LayerSource,
    index: int,
    text: Text,
    own: Own = (),
    scratch: Path | None = None,
    spread: Spread = ALONE,
) -> tuple[Sums, Sums]:
    """Take a text through a layer, and add up its forward sums.

    Args:
      source: the dense model.
      index: of a layer with experts.
      text: what goes through.
      own: items of `STATISTICS` to add.
      scratch: folder of states that do not fit in memory; default the system's.
      spread: processes that share the text.

    Returns:
      (sums of each part of all processes' texts, [parts, ...], facts [1, ...] of the weights and of
      all parts), as a sweep logs them.

    Raises:
      FullDiskError: there is no room in the scratch folder.
    """
    shape = (*text.parts.batches.tokens.shape, source.config.d_model)
    with temporary_states(SLOTS, shape, jnp.float32, scratch) as states:
        rows = text.parts.batches.rows
        visit = _Visit(text, own, (InSlot(states, 0, rows), InSlot(states, 1, rows)), spread)
        count = groups_of(source, index)
        group = group_of(source, index, 0)
        rest = rest_of(group)
        visit.begin(rest, no_sums(group, source.config.d_model, len(text.parts.tokens), ()))
        visit.run(group)
        for number in range(1, count):
            del group  # before the next one is read
            group = group_of(source, index, number)
            visit.run(group)
        visit.end(rest)
        visit.add(group)
        for number in reversed(range(count - 1)):
            del group
            group = group_of(source, index, number)
            visit.add(group)
        return spread.total(visit.sums), visit.facts


class _Visit:
    """What is known of a layer while its groups come and go.

    Args:
      text: what goes through it.
      own: items of `STATISTICS` to add.
      between: where the text lies between groups.
      spread: processes that share the text.
    """

    def __init__(self, text: Text, own: Own, between: Between, spread: Spread):
        self.sums: Sums = {}
        self.facts: Sums = {}
        self._text, self._own, self._between, self._spread = text, own, between, spread
        self._weights: list[Array] = []  # of the tokens of each batch

    def begin(self, rest: DecoderLayer, sums: Sums) -> None:
        """Do what comes before the experts; `sums` of all are zero."""
        self.sums, self._experts = sums, sums["tokens"].shape[1]
        for number, rows, place in self._batches():
            keep(self._between, number, layer_begin(rest, self._text.entering(rows), place))

    def run(self, group: DecoderLayer) -> None:
        """Add what the experts of a group give."""
        self._note(own_experts(group), layer_facts(group))
        for number, _, place in self._batches():
            self._between[1][number] = np.asarray(observed_group(group, self._at(number), place))

    def end(self, rest: DecoderLayer) -> None:
        """Do what comes behind the experts."""
        for number, rows, place in self._batches():
            halfway = self._at(number)
            out, weights = _ended(rest, halfway, place)
            self._weights.append(weights)
            self._text.leave(rows, halfway.middle.astype(halfway.dtype), out)

    def add(self, group: DecoderLayer) -> None:
        """Add the sums over a group's tokens."""
        own, parts = own_experts(group), self._text.parts
        norm = self.facts["down_norm"][0, own]
        costs = SampledCosts(group, parts, self._spread) if self._text.obs else None
        how = {"is_first": not own.start, "own": self._own, "rows": self._text.obs}
        for number, rows, place in self._batches():
            if number >= len(parts.owner):
                continue  # padding of a process that has fewer batches than others
            given = self._at(number), place, self._weights[number]
            found, of_layer, seen = _sums(group, *given, **how)
            add_batch(self.sums, parts.owner[number], found, norm, own)
            add_batch(self.sums, parts.owner[number], of_layer, norm)
            if costs is not None:
                costs.add(rows, seen)
        if costs is not None:
            energy = self._spread.total({"energy": self.sums["energy"][:, own]})["energy"]
            self._note(own, {"elimination": costs.found(energy, norm)})

    def _note(self, own: slice, facts: Sums) -> None:
        """Keep facts [1, g, F] of some of the layer's experts."""
        for name, value in facts.items():
            shape = (1, self._experts, value.shape[2])
            self.facts.setdefault(name, np.zeros(shape))[:, own] = value

    def _batches(self) -> Iterator[tuple[int, slice, Context]]:
        batches = self._text.parts.batches
        return zip(itertools.count(), batches.rows, batches.places)

    def _at(self, number: int) -> Halfway:
        return taken(self._between, number, self._text.dtype)


@jax.jit
def _ended(rest: DecoderLayer, halfway: Halfway, context: Context) -> tuple[Array, Array]:
    """The output of a layer [B, T, D], and `token_weights` [N]."""
    out = layer_end(rest, halfway)
    return out, token_weights(out.reshape(-1, out.shape[-1]), context.valid.reshape(-1))


@partial(jax.jit, static_argnames=("is_first", "own", "rows"))
def _sums(
    group: DecoderLayer,
    halfway: Halfway,
    context: Context,
    weights: Array,
    is_first: bool,
    own: Own,
    rows: bool,
) -> tuple[dict[str, Array], dict[str, Array], GramRows | None]:
    """Sums of a group's experts and, with the first group, those of the layer; and what the tokens
    add to Grams, if `rows` asks for it."""
    assert isinstance(group.mlp, MoE)
    trace = group_trace(group, halfway, context, observe_experts)
    routed = halfway.routed.astype(halfway.dtype)  # as a whole layer's are
    y = routed.astype(jnp.float32).reshape(-1, routed.shape[-1])
    sums = expert_sums(group.mlp.experts, trace, weights, y, own)
    of_layer = block_sums(trace, weights, y) if is_first else {}
    return sums, of_layer, gram_rows(trace, weights) if rows else None
