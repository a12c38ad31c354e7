"""Repair of a whole pruned model, layer by layer, into a folder; and the model that it makes."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from moe_jax.experts.moe import MoE
from moe_jax.groups import own_experts
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import (
    Batches,
    LayerSource,
    in_batches,
    layer_attend,
    layer_feed_forward,
    mapped,
    sweep,
)
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import allowance, release_memory
from pruning.scores.routed import routed
from pruning.shrink.progress import LayerArrays, LayerFolder, States, held_out
from pruning.shrink.prune import pruned_layer
from pruning.shrink.repair_choice import RepairedLayer, Text, chosen, errors_at_tokens, lacking
from pruning.shrink.repair_groups import InGroups
from pruning.shrink.repair_layer import PASSES, Changes, LayerRepair, Ridges, reached

SUMMARY = "repair.json"
LEAST_WINDOWS = 3  # two halves and one held out
Mode = Literal["expert", "layer"]


def repair_model(
    source: LayerSource,
    plan: PruningPlan,
    tokens: np.ndarray,
    valid: np.ndarray,
    folder: Path,
    *,
    mode: Mode,
    provenance: dict,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
    spread: Spread = ALONE,
    scratch: Path | None = None,
) -> list[RepairedLayer]:
    """Refit the down-projections, and output biases, of what a plan keeps.

    Every layer is repaired behind the repaired layers before it, beside the dense model. Of the
    windows one in eight is held out; the others, in turns, are the halves of `HalvedRidge`.

    Processes share the windows. Sums over tokens are added over them, one expert after the other,
    and in each pass over the experts again: what one is to make up for depends on those before.
    Then all solve alike, and process 0 writes.

    Args:
      source: the dense model; at most one of its layers is held, or one of its groups, see
        `pruning.shrink.repair_groups`.
      plan: what is kept of it.
      tokens: int32 [B, T] calibration windows, B at least `LEAST_WINDOWS`.
      valid: bool [B, T].
      folder: where the repaired weights go, a file per layer, and last a summary, without which it
        is not whole. What lies there of another provenance goes first. If an earlier call was
        killed there, this one goes on after its last layer.
      mode: "expert" makes each expert give what it gave before; "layer" also lets the experts of a
        layer make up for each other. `chosen` says which of them, if any, a layer gets.
      provenance: all that the weights depend on, JSON-compatible; kept in the folder.
      batch: windows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.
      spread: the processes.
      scratch: folder of what does not fit in memory beside a layer in groups; default the system's.

    Returns:
      What became of every layer; nothing of those before the first that lacks a channel.

    Raises:
      FullDiskError: the disk is full; what was finished stays.
    """
    files, parts = repaired_in(folder, spread), held_out(len(tokens))
    learnt, held = (
        Text.of(in_batches(source, tokens[part], valid[part], batch), spread) for part in parts
    )
    texts = learnt, held
    layers, x = files.open(provenance) or ([], _begun(source, texts, dtype))
    # Sums are added over processes in one order, whatever each of them finds again.
    room = min(spread.told(allowance().of(sys.maxsize)))
    rounds = PASSES if mode == "layer" else 0
    work = InGroups(source, plan, texts, rounds, room, scratch)

    def keep(index: int, arrays: LayerArrays, about: RepairedLayer, x: States) -> States:
        layers.append(dataclasses.asdict(about))
        files.add(index, arrays, provenance, layers, x)
        release_memory()  # a layer's texts come in pieces, which glibc would keep for the next
        return x

    def step(index: int, dense: DecoderLayer, x: States) -> States:
        repaired, arrays, about = _repair(index, dense, plan, texts, x, rounds, room)
        for text, states in zip(texts, x[2:], strict=True):
            text.own.each(states, lambda x, place, rows: layer_feed_forward(repaired, x, place))
        return keep(index, arrays, about, x)

    def in_groups(index: int, x: States) -> States:
        with work.layer(index, x, _stays(plan, index)) as (arrays, about):
            return keep(index, arrays, about, x)

    sweep(
        source, x, step, layers=range(len(layers), len(source)), on_layer=on_layer,
        in_groups=in_groups,
    )  # fmt: skip
    files.close(provenance, layers)
    return [RepairedLayer(**one) for one in layers]


def _stays(plan: PruningPlan, index: int) -> bool:
    """Whether a layer is not to be repaired: nothing is removed as far as it, or ever in it."""
    until = [layer <= index for layer in plan.layer_indices]
    return index not in plan.layer_indices or bool(plan.keep[until].all())


def _begun(source: LayerSource, texts: tuple[Text, Text], dtype) -> States:
    """What enters the dense model, and the same once more for the pruned one."""
    first = tuple(text.own.embedded(source, dtype) for text in texts)
    return *first, *(list(x) for x in first)


def _repair(
    index: int,
    dense: DecoderLayer,
    plan: PruningPlan,
    texts: tuple[Text, Text],
    x: States,
    rounds: int,
    room: int,
) -> tuple[DecoderLayer, dict[str, np.ndarray], RepairedLayer]:
    """One layer: x[:2] go through the dense one, x[2:] through its repaired attention."""
    pruned = pruned_layer(index, dense, plan)
    for text, wanted, states in zip(texts, x[:2], x[2:], strict=True):
        text.own.each(wanted, lambda x, place, rows: layer_attend(dense, x, place))
        text.own.each(wanted, lambda x, place, rows: layer_feed_forward(dense, x, place))
        text.own.each(states, lambda x, place, rows: layer_attend(pruned, x, place))
    if _stays(plan, index):
        return pruned, {}, RepairedLayer(index, "none", 0, 0, 0, {})
    seen, held = texts
    keep = plan.keep[plan.layer_indices.index(index)]
    reach = routed(dense, x[2], seen.own.places, seen.rows % 2 == 0)
    tokens = reached(reach, seen.spread)
    work = LayerRepair(dense, pruned, keep, reach, tokens, Ridges(room), seen.spread)
    changes: dict[str, Changes] = {"none": {}, "expert": work.alone()}
    layers = {name: work.repaired(change) for name, change in changes.items()}
    if rounds:
        lacks = jnp.asarray(lacking(x[0], _behind(layers["expert"], seen.own, x[2])))
        changes["layer"] = dict(changes["expert"])
        for _ in range(rounds):
            lacks = work.together(lacks, changes["layer"])
        layers["layer"] = work.repaired(changes["layer"])
    errors = {
        name: errors_at_tokens(held, x[1], _behind(layer, held.own, x[3]))
        for name, layer in layers.items()
    }
    choice, said = chosen(errors), {name: float(error.sum()) for name, error in errors.items()}
    about = RepairedLayer(
        index, choice, int(work.mendable.sum()), len(changes[choice]), work.starved, said
    )
    return layers[choice], _stored(layers[choice], keep) if changes[choice] else {}, about


def _behind(
    layer: DecoderLayer, text: Batches, middle: list[np.ndarray]
) -> Iterator[np.ndarray]:  # [b, T, D]
    """What stands behind a layer, a batch at a time, so that the text is not held once more."""
    for x, place in zip(middle, text.places, strict=True):
        yield np.asarray(layer_feed_forward(layer, jnp.asarray(x), place))


def _stored(layer: DecoderLayer, keep: np.ndarray) -> dict[str, np.ndarray]:
    assert isinstance(layer.mlp, MoE)
    experts = layer.mlp.experts
    arrays = {"w_down": np.asarray(experts.w_down)[: int(keep.sum())]}
    return arrays | ({} if experts.b_down is None else {"b_down": np.asarray(experts.b_down)})


def repaired_in(folder: Path, spread: Spread = ALONE) -> LayerFolder:
    """A folder of `repair_model`."""
    return LayerFolder(folder, SUMMARY, "the repaired weights", RepairedLayer, spread)


def with_repair(pruned: LayerSource, plan: PruningPlan, folder: Path) -> LayerSource:
    """A pruned model with the repaired weights in a folder of `repair_model`.

    Args:
      pruned: the model of the plan that was repaired.
      plan: that one.
      folder: of the weights; those of each layer, or of a group of it, are read with it.
    """
    files = repaired_in(folder)

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        if index not in plan.layer_indices:
            return layer
        assert isinstance(layer.mlp, MoE)
        own, experts = own_experts(layer), layer.mlp.experts
        ends = np.append(0, np.cumsum(plan.keep[plan.layer_indices.index(index)].sum(axis=1)))
        rows = slice(int(ends[own.start]), int(ends[own.stop]))
        stored = files.rows(index, {"w_down": rows, "b_down": own})
        if not stored:
            return layer
        down = np.zeros(experts.w_down.shape, stored["w_down"].dtype)
        down[: len(stored["w_down"])] = stored["w_down"]
        bias = jnp.asarray(stored["b_down"]) if "b_down" in stored else experts.b_down
        experts = dataclasses.replace(experts, w_down=jnp.asarray(down), b_down=bias)
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))

    return mapped(pruned, change, by_group=True)
