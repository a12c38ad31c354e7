"""Many pruning plans of one model, run masked: each layer is read once for all of them.

A removed channel stands behind all others in the layer's pools, where no expert comes to it: the
same function as cutting it out (`prune_layer`), in arrays of one shape. The mask is an argument, so
all plans share one compilation. With a sample of the calibration text,
the down-projections of what is kept take over what they can: what a repair will begin with. Weights
may be rounded as an export of each plan rounds them, and tokens may go to fewer experts.
"""

import dataclasses
import itertools
from collections.abc import Callable, Hashable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.groups import GroupStep, Halfway, add_group, own_experts, through_groups
from moe_jax.stream import LayerSource, in_batches, layer_forward, sweep
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.scores.grams import Seen
from pruning.scores.sample import Sample, SeenInGroups
from pruning.shrink.fewer_experts import Fewer
from pruning.shrink.masked_layer import masked_forward, masked_group, masked_layer
from pruning.shrink.prune import cut_router
from pruning.shrink.rounding import rounded_as_cut, rounded_layer
from pruning.shrink.taken_over import taken_over

PLAIN = "bf16"  # weights that are not rounded
Variants = list[list[np.ndarray]]  # of each plan, an array per batch


def masked_hidden(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    plans: Sequence[PruningPlan],
    *,
    storages: Sequence[str | Sequence[str]] = (),
    fewer: Sequence[Fewer | None] = (),
    routed: np.ndarray | None = None,
    group_size: int = 32,
    sample: Sample | None = None,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Hidden states before the head of several pruned models.

    As far up as plans keep the same and store it alike, one is run for all of them.

    Args:
      source: the dense model; every layer is read once.
      tokens: int32 [B, T].
      valid: bool [B, T].
      plans: V plans of this model.
      storages: how the weights under each plan are stored, "bf16" or as of `rounded_layer`, or so
        for each layer of the model; () for all in 16 bits. A layer is rounded once however many
        plans there are, but for the down-projections of its experts.
      fewer: to which of their experts tokens go under each plan; () for those that the plan says.
      routed: float64 [V], to which is added, where there is a `Fewer`, how often tokens of the text
        go to an expert in all layers of the plan.
      group_size: weights per scale of integers.
      sample: of other text, below the first layer of this model; it is taken through all. With it
        the kept channels of each expert take over what is gone, see `taken_over`.
      batch: rows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      [V, B, T, D] on the host.

    Raises:
      InputError: a plan is of another shape than the model's experts.
    """
    text = in_batches(source, tokens, valid, batch)
    ways = _ways(len(source), plans, storages, fewer)
    alike = _Alike(len(plans))

    def step(index: int, layer: DecoderLayer, variants: Variants) -> Variants:
        seen = None if sample is None else sample.through(index, layer)
        stored = {way.stored[index] for way in ways} - {PLAIN}
        rounded = {how: rounded_layer(layer, group_size, how) for how in stored}
        alike.next_layer()
        for number, (x, way) in enumerate(zip(variants, ways, strict=True)):
            masks, how = _masks(layer, index, way.plan), way.stored[index]
            if (same := alike.to(number, way.does(masks, how))) != number:
                x[:] = variants[same]
                continue
            kept = _kept_layer(layer, rounded.get(how), seen, way, masks, group_size, how)
            numbers = None if way.choice is None else _numbers(way.choice)

            def run(
                x: Array, place: Context, rows: slice, masks=masks, layer=kept, numbers=numbers,
                number=number,
            ) -> Array:  # fmt: skip
                if masks is None:
                    return layer_forward(layer, x, place)
                out, left = masked_forward(layer, x, place, numbers)
                if left is not None and routed is not None:
                    routed[number] += int(left)
                return out

            text.each(x, run)
        return variants

    def in_groups(index: int, variants: Variants) -> Variants:
        alike.forget()
        seen = None if sample is None else sample.in_groups(source, index)
        steps = (_masked_step(index, way, seen) for way in ways)
        through_groups(
            source, index, [(text, x, step) for x, step in zip(variants, steps, strict=True)]
        )
        return variants

    plain = all(way.is_plain for way in ways)
    first = text.embedded(source, dtype)
    last = sweep(
        source, [list(first) for _ in plans], step, on_layer=on_layer,
        in_groups=in_groups if plain else None,
    )  # fmt: skip
    hidden = np.empty((len(plans), *tokens.shape, source.config.d_model), dtype)
    for x, out in zip(last, hidden, strict=True):
        text.joined(x, out)
    return hidden


@dataclasses.dataclass(frozen=True, eq=False)
class _Way:
    """How one of the models differs from the dense one, see `masked_hidden`; `stored` by layer."""

    plan: PruningPlan
    stored: Sequence[str]
    choice: Fewer | None

    @property
    def is_plain(self) -> bool:
        """Whether channels are removed and nothing else is done."""
        return {*self.stored} <= {PLAIN} and self.choice is None and not self.plan.cut_router

    def does(self, masks: tuple | None, how: str) -> Hashable | None:
        """What is done to a layer, equal for ways that do the same; None if that is not told."""
        if self.choice is not None or self.plan.constants is not None:
            return None
        return how, self.plan.cut_router, b"" if masks is None else np.asarray(masks[0]).tobytes()


def _ways(
    layers: int,
    plans: Sequence[PruningPlan],
    storages: Sequence[str | Sequence[str]],
    fewer: Sequence[Fewer | None],
) -> list[_Way]:
    stored = [
        [how] * layers if isinstance(how, str) else how for how in storages or [PLAIN] * len(plans)
    ]
    own = [None if plan.top_k is None else Fewer(plan.top_k) for plan in plans]
    return [_Way(*one) for one in zip(plans, stored, fewer or own, strict=True)]


class _Alike:
    """Which of the models have been the same so far: one is run for all of them."""

    def __init__(self, models: int):
        self._fresh = itertools.count(1)
        self._states = [0] * models  # of equal numbers they are the same
        self.next_layer()

    def next_layer(self) -> None:
        """Begin with a layer."""
        self._before, self._done = self._states[:], {}

    def to(self, number: int, does: Hashable | None) -> int:
        """The first model that is the same behind the layer, to which a model `does` something."""
        same = number
        if does is not None:
            same = self._done.setdefault((self._before[number], does), number)
        self._states[number] = next(self._fresh) if same == number else self._states[same]
        return same

    def forget(self) -> None:
        """A layer was taken otherwise, and nothing is known to be the same."""
        self._states = [next(self._fresh) for _ in self._states]


def _kept_layer(
    layer: DecoderLayer,
    rounded: DecoderLayer | None,
    seen: Seen | None,
    way: _Way,
    masks: tuple | None,
    group_size: int,
    how: str,
) -> DecoderLayer:
    """The layer that a way runs under its mask: what is kept has taken over what is gone, weights
    are rounded, the router is cut."""
    if masks is None:
        return layer if rounded is None else rounded
    keep = np.asarray(masks[0])
    kept = layer if seen is None else taken_over(layer, seen, keep)
    if rounded is not None:
        kept = rounded_as_cut(rounded, kept, keep, group_size, how)
    if not keep.all():
        kept = masked_layer(kept, *masks)
    return cut_router(kept, keep.any(axis=1)) if way.plan.cut_router else kept


def _numbers(choice: Fewer) -> tuple[Array, Array]:
    return jnp.int32(choice.top_k), jnp.float32(choice.skip_below)


def _masked_step(index: int, way: _Way, seen: SeenInGroups | None) -> GroupStep:
    """What a way, which is plain, makes of the groups of a layer."""

    def step(group: DecoderLayer) -> Callable[[Halfway, Context, slice], Array]:
        masks = _masks(group, index, way.plan)
        if masks is None:
            return add_group(group)
        shown = None if seen is None else seen.of(group)
        kept = _kept_layer(group, None, shown, way, masks, 0, PLAIN)
        return lambda halfway, place, rows: masked_group(kept, halfway, place)

    return step


def _masks(layer: DecoderLayer, index: int, plan: PruningPlan) -> tuple[Array, Array | None] | None:
    if index not in plan.layer_indices:
        return None
    slot = plan.layer_indices.index(index)
    own = own_experts(layer) if isinstance(layer.mlp, MoE) else slice(None)
    keep = plan.keep[slot, own]
    rows = layer.mlp.experts.w_down.shape[0] if isinstance(layer.mlp, MoE) else 0
    if rows != keep.size:
        raise InputError(
            f"the plan keeps some of {list(keep.shape)} channels in layer {index}, which has "
            f"{rows}; the plan was made for another model"
        )
    constants = plan.added(slot)
    return jnp.asarray(keep), None if constants is None else jnp.asarray(constants[own])
