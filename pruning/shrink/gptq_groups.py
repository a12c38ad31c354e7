"""GPTQ of a decoder layer that is taken in groups of its experts.

Second moments are those of single experts, so each group is read once: it is solved, its codes are
kept, and what it gives is added up in the four ways in which the layer is run: as it is, rounded
and quantised on what is held out, and quantised on what is learnt from.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moe_jax.experts.moe import MoE
from moe_jax.groups import (
    each_group,
    group_forward,
    keep,
    layer_begin,
    layer_end,
    rest_of,
    taken,
)
from moe_jax.quantized import quantize_layer
from moe_jax.source import LayerSource
from moe_jax.spread import Spread
from moe_jax.stream import Batches, layer_attend
from moe_jax.transformer import DecoderLayer
from pruning.scores.states import InSlot, States, temporary_states
from pruning.shrink.gptq import (
    Seen,
    Solved,
    attention_matrices,
    quantised_attention,
    quantised_experts,
    quantised_shared,
)
from pruning.shrink.gptq_codes import CodesInGroups, stored_codes
from pruning.shrink.gptq_errors import LayerErrors, errors_of
from pruning.shrink.progress import LayerArrays
from pruning.shrink.progress import States as TextStates

SLOTS = 2  # float32 states of what is learnt from, and of three times what is held out
# How the layer is run: on which of the texts, learnt from and held out.
WAYS = {"learnt": 0, "exact": 1, "near": 1, "best": 1}


@dataclass(frozen=True, eq=False)
class InGroups:
    """GPTQ of a model whose layers are taken in groups.

    Attributes:
      source: the model.
      texts: to learn from, and held out; the windows of this process.
      group_size: weights per scale.
      moment_bytes: as of `gptq_layer`.
      spread: the processes, whose groups are alike.
      scratch: folder of what does not fit in memory; default the system's.
    """

    source: LayerSource
    texts: tuple[Batches, Batches]
    group_size: int
    moment_bytes: int
    spread: Spread
    scratch: Path | None = None

    @contextmanager
    def layer(self, index: int, x: TextStates) -> Iterator[tuple[LayerArrays, LayerErrors]]:
        """Quantise a layer and take both texts through it.

        Args:
          index: of the layer.
          x: states of both texts before it, which become those behind it.

        Returns:
          (what to keep of it, until the block is left; its errors).

        Raises:
          FullDiskError: there is no room in the scratch folder.
        """
        with ExitStack() as stack:
            at_work = _Layer(self, x, stack)
            for group in each_group(self.source, index):
                at_work.add(group)
                del group  # before the next one is read
            yield at_work.quantised()


class _Layer:
    """A layer while its groups come and go; as of `InGroups.layer`."""

    def __init__(self, work: InGroups, x: TextStates, stack: ExitStack):
        self._work, self._x, self._stack = work, x, stack
        self._rests: dict[str, DecoderLayer] = {}  # what all groups share, in each way
        moe = work.source.config.moe
        self._codes = CodesInGroups(moe.num_experts * moe.d_expert, stack, work.scratch)
        self._matrices = self._fallbacks = 0
        learnt, held = (len(text.tokens) for text in work.texts)
        shape = (learnt + 3 * held, *x[0][0].shape[1:])
        states = stack.enter_context(temporary_states(SLOTS, shape, jnp.float32, work.scratch))
        starts = {"learnt": 0} | {
            way: learnt + number * held for number, way in enumerate(("exact", "near", "best"))
        }
        self._between = {way: self._slots(states, way, start) for way, start in starts.items()}
        self._dtype = x[0][0].dtype

    def add(self, group: DecoderLayer) -> None:
        """Quantise a group, and add what it gives."""
        assert isinstance(group.mlp, MoE)
        work, size = self._work, self._work.group_size
        rounded = quantize_layer(group, size)
        assert isinstance(rounded.mlp, MoE)
        if not self._rests:
            self._begin(group, rounded)
        experts, solved = quantised_experts(
            group, rounded.mlp.experts, self._middle, size, work.moment_bytes
        )
        self._matrices += solved.matrices
        self._fallbacks += solved.fallbacks
        self._codes.put(experts)
        best = dataclasses.replace(rounded, mlp=dataclasses.replace(rounded.mlp, experts=experts))
        forms = {"learnt": best, "exact": group, "near": rounded, "best": best}
        for way, form in forms.items():
            text, between = work.texts[WAYS[way]], self._between[way]
            for i, place in enumerate(text.places):
                halfway = taken(between, i, self._dtype)
                between[1][i] = np.asarray(group_forward(form, halfway, place))

    def quantised(self) -> tuple[LayerArrays, LayerErrors]:
        """As of `InGroups.layer`; takes the texts behind the layer."""
        work, (learnt, held) = self._work, self._x
        best = self._rests["best"]
        assert isinstance(best.mlp, MoE)
        shared, missed = quantised_shared(
            self._rests["exact"], best.mlp.shared, self._middle, work.group_size
        )
        best = dataclasses.replace(best, mlp=dataclasses.replace(best.mlp, shared=shared))
        self._rests |= {"best": best, "learnt": best}
        matrices = self._matrices + attention_matrices(best) + (0 if shared is None else 3)
        solved = Solved(matrices=matrices, fallbacks=self._fallbacks + missed)
        outputs = [self._behind(way) for way in ("exact", "near", "best")]
        errors = errors_of(work.texts[1], held, outputs, solved, work.spread)
        for states, way in ((learnt, "learnt"), (held, "best")):
            for i, behind in enumerate(self._behind(way)):
                states[i] = behind
        return {**stored_codes(best), **self._codes.arrays()}, errors

    def _begin(self, group: DecoderLayer, rounded: DecoderLayer) -> None:
        """Quantise the attention, and do what comes before the experts."""
        work, (learnt, _) = self._work, self._work.texts
        seen = Seen(list(zip(self._x[0], learnt.places, strict=True)), work.spread)
        attention, self._fallbacks = quantised_attention(
            group, rounded.attention, seen, work.group_size
        )
        best = dataclasses.replace(rest_of(rounded), attention=attention)
        self._rests = {"exact": rest_of(group), "near": rest_of(rounded), "best": best}
        self._rests["learnt"] = best
        half = dataclasses.replace(rest_of(group), attention=attention)
        behind = [
            (np.asarray(layer_attend(half, jnp.asarray(x), place)), place)
            for x, place in seen.batches
        ]
        self._middle = Seen(behind, work.spread)
        for way, number in WAYS.items():
            for i, place in enumerate(work.texts[number].places):
                begun = layer_begin(self._rests[way], jnp.asarray(self._x[number][i]), place)
                keep(self._between[way], i, begun)

    def _behind(self, way: str) -> Iterator[np.ndarray]:  # [b, T, D]
        """What stands behind the layer, a batch at a time."""
        for i in range(len(self._work.texts[WAYS[way]].rows)):
            yield np.asarray(layer_end(self._rests[way], taken(self._between[way], i, self._dtype)))

    def _slots(self, states: States, way: str, start: int) -> tuple[InSlot, InSlot]:
        rows = [
            slice(own.start + start, own.stop + start) for own in self._work.texts[WAYS[way]].rows
        ]
        return InSlot(states, 0, rows), InSlot(states, 1, rows)
