"""Repair of a whole pruned model, layer by layer, into a folder; and the model that it makes."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.experts.moe import MoE
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
from pruning.kit.memory import release_memory
from pruning.scores.parts import dealt
from pruning.scores.routed import routed
from pruning.shrink.progress import LayerFolder, States, held_out
from pruning.shrink.prune import pruned_layer
from pruning.shrink.repair_layer import LayerRepair

SUMMARY = "repair.json"
LEAST_WINDOWS = 3  # two halves and one held out
Mode = Literal["expert", "layer"]


@dataclass(frozen=True)
class RepairedLayer:
    """What became of one layer.

    Attributes:
      index: of the layer in the model.
      choice: "expert" if every expert makes up for its own channels, "layer" if for those of all,
        "none" if the layer is as it was pruned; see `chosen`.
      experts: how many keep something that repair can change.
      changed: how many of them were changed.
      starved: how many of them fewer tokens reached than they keep channels.
      errors: choice -> squared error of the residual stream behind the layer, on held-out windows.
    """

    index: int
    choice: str
    experts: int
    changed: int
    starved: int
    errors: dict[str, float]


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
) -> list[RepairedLayer]:
    """Refit the down-projections, and output biases, of what a plan keeps.

    Every layer is repaired behind the repaired layers before it, beside the dense model. Of the
    windows one in eight is held out; the others, in turns, are the halves of `HalvedRidge`.

    Processes share the windows. Sums over tokens are added over them, one expert after the other,
    and in each pass over the experts again: what one is to make up for depends on those before.
    Then all solve alike, and process 0 writes.

    Args:
      source: the dense model; at most one of its layers is held.
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

    Returns:
      What became of every layer; nothing of those before the first that lacks a channel.

    Raises:
      FullDiskError: the disk is full; what was finished stays.
    """
    files, parts = repaired_in(folder, spread), held_out(len(tokens))
    texts = tuple(
        Text.of(in_batches(source, tokens[part], valid[part], batch), spread) for part in parts
    )
    layers, x = files.open(provenance) or ([], _begun(source, texts, dtype))

    def step(index: int, dense: DecoderLayer, x: States) -> States:
        repaired, arrays, about = _repair(index, dense, plan, texts, x, mode)
        layers.append(dataclasses.asdict(about))
        for text, states in zip(texts, x[2:], strict=True):
            text.own.each(states, lambda x, place, rows: layer_feed_forward(repaired, x, place))
        files.add(index, arrays, provenance, layers, x)
        release_memory()  # a layer's texts come in pieces, which glibc would keep for the next
        return x

    sweep(source, x, step, layers=range(len(layers), len(source)), on_layer=on_layer)
    files.close(provenance, layers)
    return [RepairedLayer(**one) for one in layers]


@dataclass(frozen=True, eq=False)
class Text:
    """A text of which this process has some windows.

    Attributes:
      valid: bool [B, T], of the whole text.
      own: those windows, with others of padding.
      rows: int [b], which of the text's windows each of these is, B for padding.
      spread: the processes that have it together.
    """

    valid: np.ndarray
    own: Batches
    rows: np.ndarray
    spread: Spread

    @classmethod
    def of(cls, whole: Batches, spread: Spread) -> "Text":
        """This process's part of a text."""
        return cls(whole.valid, *dealt(whole, spread), spread)

    def each_token(self, values: np.ndarray) -> np.ndarray:
        """Numbers of all valid tokens of the text, float64 [N], from those of this process's
        windows, [b, T]."""
        whole = np.zeros((len(self.valid) + 1, self.valid.shape[1]))
        whole[self.rows] = values
        return self.spread.total({"values": whole[:-1]})["values"][self.valid]


def _begun(source: LayerSource, texts: tuple[Text, ...], dtype) -> States:
    """What enters the dense model, and the same once more for the pruned one."""
    first = tuple(text.own.embedded(source, dtype) for text in texts)
    return *first, *(list(x) for x in first)


def _repair(
    index: int,
    dense: DecoderLayer,
    plan: PruningPlan,
    texts: tuple[Text, ...],
    x: States,
    mode: Mode,
) -> tuple[DecoderLayer, dict[str, np.ndarray], RepairedLayer]:
    """One layer: x[:2] go through the dense one, x[2:] through its repaired attention."""
    pruned = pruned_layer(index, dense, plan)
    for text, wanted, states in zip(texts, x[:2], x[2:], strict=True):
        text.own.each(wanted, lambda x, place, rows: layer_attend(dense, x, place))
        text.own.each(wanted, lambda x, place, rows: layer_feed_forward(dense, x, place))
        text.own.each(states, lambda x, place, rows: layer_attend(pruned, x, place))
    before = [slot for slot, layer in enumerate(plan.layer_indices) if layer <= index]
    if index not in plan.layer_indices or plan.keep[before].all():
        return pruned, {}, RepairedLayer(index, "none", 0, 0, 0, {})
    seen, held = texts
    keep = plan.keep[before[-1]]
    reach = routed(dense, x[2], seen.own.places, seen.rows % 2 == 0)
    work = LayerRepair(dense, pruned, keep, reach, seen.spread)
    changes = {"none": {}, "expert": work.alone()}
    layers = {name: work.repaired(change) for name, change in changes.items()}
    if mode == "layer":
        lacks = _lacking(layers["expert"], seen.own, x[0], x[2])
        changes["layer"] = work.together(lacks, changes["expert"])
        layers["layer"] = work.repaired(changes["layer"])
    errors = {name: _errors(layer, held, x[1], x[3]) for name, layer in layers.items()}
    choice, said = chosen(errors), {name: float(error.sum()) for name, error in errors.items()}
    about = RepairedLayer(
        index, choice, int(work.mendable.sum()), len(changes[choice]), work.starved, said
    )
    return layers[choice], _stored(layers[choice], keep) if changes[choice] else {}, about


def chosen(errors: Mapping[str, np.ndarray]) -> str:
    """The repair that errs least on held-out tokens, if that is more than chance.

    Args:
      errors: name -> errors [N] on the same tokens; "none" are those without repair.

    Returns:
      The name of the least errors; "none" if they are not less than its own by more than the
      standard error of the difference.
    """
    best = min(errors, key=lambda name: errors[name].sum())
    less = errors["none"] - errors[best]
    return best if less.sum() > less.std() * len(less) ** 0.5 else "none"


def _lacking(
    layer: DecoderLayer, text: Batches, wanted: list[np.ndarray], middle: list[np.ndarray]
) -> Array:  # float32 [N, D]
    """What the stream behind a layer lacks of what it should be."""
    size, done = wanted[0].shape[-1], 0
    lacks = np.empty((sum(part.size for part in wanted) // size, size), np.float32)
    for part, found in zip(wanted, _behind(layer, text, middle), strict=True):
        rows = slice(done, done := done + part.size // size)
        # bfloat16 is widened before the two are subtracted.
        np.subtract(part, found, out=lacks[rows].reshape(part.shape), dtype=np.float32)
    return jnp.asarray(lacks)


def _errors(
    layer: DecoderLayer, text: Text, wanted: list[np.ndarray], middle: list[np.ndarray]
) -> np.ndarray:  # float64 [N]
    """Squared error of the stream behind a layer at every token, of all processes."""
    own, errors = text.own, np.zeros(text.own.valid.shape)
    parts = zip(wanted, _behind(layer, own, middle), own.rows, strict=True)
    for a, b, rows in parts:
        valid = own.valid[rows]
        squares = np.square(a.astype(np.float64) - b.astype(np.float64))[valid]
        errors[rows][valid] = squares.sum(axis=1)
    return text.each_token(errors)


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


def with_repair(pruned: LayerSource, folder: Path) -> LayerSource:
    """A pruned model with the repaired weights in a folder of `repair_model`.

    Args:
      pruned: the model of the plan that was repaired.
      folder: of the weights; each layer's are read with it.
    """

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        stored = repaired_in(folder).arrays(index)
        if not stored:
            return layer
        assert isinstance(layer.mlp, MoE)
        experts = layer.mlp.experts
        down = np.zeros(experts.w_down.shape, stored["w_down"].dtype)
        down[: len(stored["w_down"])] = stored["w_down"]
        bias = jnp.asarray(stored["b_down"]) if "b_down" in stored else experts.b_down
        experts = dataclasses.replace(experts, w_down=jnp.asarray(down), b_down=bias)
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))

    return mapped(pruned, change)
