"""Many pruning plans of one model, run masked: no pruned weights are made, each layer is read once.

A removed channel is a zero row of `w_down`: the same function as cutting it out (`prune_layer`).
The mask is an argument, so all plans share one compilation. With a sample of the calibration text,
the down-projections of what is kept take over what they can: what a repair will begin with. Weights
may be rounded as an export of each plan rounds them, and tokens may go to fewer experts.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from itertools import chain, count

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.errors import InputError
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.experts.run import run_experts
from moe_jax.groups import (
    GroupStep,
    Halfway,
    added_group,
    group_forward,
    own_experts,
    through_groups,
)
from moe_jax.quant import dequantize
from moe_jax.stream import LayerSource, in_batches, layer_forward, sweep
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.scores.grams import Sample, Seen
from pruning.shrink.fewer_experts import Fewer, fewer_rows
from pruning.shrink.prune import cut_router, output_bias
from pruning.shrink.rounding import rounded_as_cut, rounded_layer

PLAIN = "bf16"  # weights that are not rounded
Variants = list[list[np.ndarray]]  # of each plan, an array per batch
# Pull toward the weights as they are, of the mean diagonal of a Gram: least, and for each kept
# channel per token. Over 225 to 16,000 tokens it is near the best there is, by held-out text.
PULL, PULL_OF_TOKENS = 1e-2, 4


@jax.jit
def masked_forward(
    layer: DecoderLayer,
    x: Array,  # [B, T, D]
    context: Context,
    keep: Array,  # bool [E, F]
    constants: Array | None = None,  # [E, D]
    fewer: tuple[Array, Array] | None = None,
) -> tuple[Array, Array | None]:  # [B, T, D]
    """One layer of experts without the channels that are not kept; emptied ones add constants.

    With the numbers of a `Fewer` tokens go to fewer experts, and how many these are in all, int32,
    is returned as well.
    """
    assert isinstance(layer.mlp, MoE)
    run = _masking(keep, constants, fewer, renormalize=layer.mlp.config.renormalize)
    out, trace = layer.feed_forward(layer.attend(x, context)[0], context, run)
    assert trace is not None
    return out, trace.kept


@jax.jit
def masked_group(
    group: DecoderLayer,
    halfway: Halfway,
    context: Context,
    keep: Array,  # bool [g, F]
    constants: Array | None = None,  # [g, D]
) -> Array:  # float32 [B, T, D]
    """The same of a group, whose experts are added to those before them; tokens go to all."""
    run = _masking(keep, constants)
    return added_group(group, halfway, context, run).routed.reshape(halfway.routed.shape)


def _masking(
    keep: Array,
    constants: Array | None,
    fewer: tuple[Array, Array] | None = None,
    *,
    renormalize: bool = False,
) -> Callable[..., tuple[Array, Array | None]]:
    def run(
        experts: Experts,
        tokens: Array,
        row_weight: Array,
        dispatch: Dispatch,
        onto: Array | None = None,
    ):
        down = dequantize(experts.w_down)
        down = jnp.where(keep.reshape(-1, 1), down, jnp.zeros((), down.dtype))
        bias = output_bias(experts, keep, constants)
        masked, left = dataclasses.replace(experts, w_down=down, b_down=bias), None
        if fewer is not None:
            row_weight, left = fewer_rows(
                row_weight, dispatch, len(tokens), fewer, renormalize=renormalize
            )
        return run_experts(masked, tokens, row_weight, dispatch, onto=onto)[0], left

    return run


def masked_hidden(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    plans: Sequence[PruningPlan],
    *,
    storages: Sequence[str | Sequence[str]] = (),
    fewer: Sequence[Fewer | None] = (),
    cut: Sequence[bool] = (),
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
      fewer: to which of their experts tokens go under each plan; () for all to all.
      cut: whether tokens are routed among the experts alone that keep something, see `cut_router`;
        () for no plan.
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
    stored = [
        [how] * len(source) if isinstance(how, str) else list(how)
        for how in storages or (PLAIN,) * len(plans)
    ]
    choices = tuple(fewer) or (None,) * len(plans)
    cuts = tuple(cut) or (False,) * len(plans)

    # What the states of each plan are: of equal numbers they are the same.
    fresh = count(1)
    states = [0] * len(plans)

    def step(index: int, layer: DecoderLayer, variants: Variants) -> Variants:
        seen = None if sample is None else sample.through(index, layer)
        here = [how[index] for how in stored]
        done: dict[Hashable, int] = {}
        before = states[:]
        rounded = {how: rounded_layer(layer, group_size, how) for how in set(here) - {PLAIN}}
        each = zip(variants, plans, here, choices, cuts, strict=True)
        for number, (x, plan, how, choice, is_cut) in enumerate(each):
            masks = _masks(layer, index, plan)
            states[number] = next(fresh)
            if choice is None and plan.constants is None:
                keep = b"" if masks is None else np.asarray(masks[0]).tobytes()
                alike = done.setdefault((before[number], how, is_cut, keep), number)
                if alike != number:
                    x[:], states[number] = variants[alike], states[alike]
                    continue
            kept = layer if seen is None or masks is None else taken_over(layer, seen, masks[0])
            if how in rounded:
                whole = rounded[how]
                keep = None if masks is None else np.asarray(masks[0])
                kept = whole if keep is None else rounded_as_cut(whole, kept, keep, group_size, how)
            if is_cut and masks is not None:
                kept = cut_router(kept, np.asarray(masks[0]).any(axis=1))
            numbers = None if choice is None else _numbers(choice)

            def run(
                x: Array, place: Context, rows: slice, masks=masks, layer=kept, numbers=numbers,
                number=number,
            ) -> Array:  # fmt: skip
                if masks is None:
                    return layer_forward(layer, x, place)
                out, left = masked_forward(layer, x, place, *masks, numbers)
                if left is not None and routed is not None:
                    routed[number] += int(left)
                return out

            text.each(x, run)
        return variants

    def in_groups(index: int, variants: Variants) -> Variants:
        states[:] = (next(fresh) for _ in plans)
        each = zip(variants, plans, strict=True)
        through_groups(source, index, [(text, x, _masked_step(index, plan)) for x, plan in each])
        return variants

    plain = sample is None and {*chain(*stored)} <= {PLAIN} and not any(choices) and not any(cuts)
    first = text.embedded(source, dtype)
    last = sweep(
        source, [list(first) for _ in plans], step, on_layer=on_layer,
        in_groups=in_groups if plain else None,
    )  # fmt: skip
    hidden = np.empty((len(plans), *tokens.shape, source.config.d_model), dtype)
    for x, out in zip(last, hidden, strict=True):
        text.joined(x, out)
    return hidden


def taken_over(layer: DecoderLayer, seen: Seen, keep: Array | np.ndarray) -> DecoderLayer:
    """A layer whose kept channels give what each expert gave with all, as near as they can.

    By least squares with a pull toward the weights as they are, each expert for itself.

    Args:
      layer: the dense layer.
      seen: of a sample behind the dense layers before it.
      keep: bool [E, F].

    Returns:
      The layer with other rows of `w_down` where channels are kept and not all of them.
    """
    assert isinstance(layer.mlp, MoE)
    experts, keep = layer.mlp.experts, np.asarray(keep)
    stored = dequantize(experts.w_down)
    down = np.array(stored, np.float32).reshape(*keep.shape, -1)
    found = (seen.tokens > 0) & keep.any(axis=1) & ~keep.all(axis=1)
    for expert in np.flatnonzero(found).tolist():
        own = keep[expert]
        down[expert, own] += moved(seen.gram(expert), down[expert], own, seen.tokens[expert])
    other = jnp.asarray(down.reshape(stored.shape)).astype(stored.dtype)
    mlp = dataclasses.replace(layer.mlp, experts=dataclasses.replace(experts, w_down=other))
    return dataclasses.replace(layer, mlp=mlp)


def moved(gram: np.ndarray, down: np.ndarray, keep: np.ndarray, tokens: int) -> np.ndarray:
    """By how much the rows of an expert's kept channels move to take over those of the others.

    Args:
      gram: float64 [F, F], sum of h h^T.
      down: [F, D], a row per channel.
      keep: bool [F], K of them.
      tokens: that the Gram is of; of fewer it is trusted less.

    Returns:
      float64 [K, D].
    """
    among, size = gram[np.ix_(keep, keep)], int(keep.sum())
    pull = max(PULL, PULL_OF_TOKENS * size / tokens) * np.diagonal(among).mean()
    if not pull > 0:
        return np.zeros((size, down.shape[1]))
    return np.linalg.solve(among + pull * np.eye(size), gram[np.ix_(keep, ~keep)] @ down[~keep])


def _numbers(choice: Fewer) -> tuple[Array, Array]:
    return jnp.int32(choice.top_k), jnp.float32(choice.skip_below)


def _masked_step(index: int, plan: PruningPlan) -> GroupStep:
    """What a plan makes of the groups of a layer."""

    def step(group: DecoderLayer, halfway: Halfway, place: Context, rows: slice) -> Array:
        masks = _masks(group, index, plan)
        if masks is None:
            return group_forward(group, halfway, place)
        return masked_group(group, halfway, place, *masks)

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
