"""One sweep over the layers collects every statistic; a second, backward, adds the gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.quant import Weight, dequantize
from moe_jax.stream import Batches, LayerSource, in_batches, row_slices, sweep
from moe_jax.transformer import DecoderLayer
from pruning.kit.progress import OnStep, counter
from pruning.scores.details import DetailSums, wanda_sums
from pruning.scores.layer import (
    GRADIENT_SCORES,
    attention_backward,
    feed_forward_backward,
    layer_statistics,
    loss_gradient,
)
from pruning.scores.noise import noise_rows, noise_worth
from pruning.scores.own import STATISTICS
from pruning.scores.states import States, projection_room
from pruning.scores.statistics import ChannelStatistics, field_shapes

CHUNK = 64  # sequences that go through all layers together
Sums = dict[str, np.ndarray]
Visit = Callable[[], None]


def collect_statistics(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    *,
    counted: np.ndarray | None = None,
    gradients: bool = False,
    expert_details: bool = False,
    finish: bool = True,
    batch: int = 8,
    chunk: int = CHUNK,
    dtype=jnp.float32,
    scratch: Path | None = None,
    on_step: OnStep | None = None,
) -> ChannelStatistics:
    """Measure a model on calibration text: the one pass that every criterion and budget shares.

    Args:
      source: the dense model, in memory or on disk; at most two of its layers are held.
      tokens: int32 [B, T].
      valid: bool [B, T]; other positions contribute exactly nothing.
      counted: bool [B, T], tokens whose prediction counts in the loss; default all. Gradients alone
        read it: statistics of activations are of all valid tokens.
      gradients: also run the backward sweep of the end-to-end next-token loss.
      expert_details: also collect vectors per expert and pairs of experts.
      finish: also compute what needs the sums of the whole text; False for a part of one.
      batch: sequences per step.
      chunk: sequences that go through all layers together; for each chunk the model is read once,
        and once more for gradients.
      dtype: of the activations; sums are float32 inside a batch, float64 across batches.
      scratch: folder of what the backward sweep cannot keep in memory; default the system's.
      on_step: receives (layer visits done, layer visits in all).

    Returns:
      The statistics.

    Raises:
      InputError: if the model has no expert layer or its experts were already pruned unevenly.
      FullDiskError: there is no room in the scratch folder.
    """
    asked = (("gradients", gradients), ("expert-details", expert_details))
    groups = [name for name, on in asked if on]
    sums = _empty_sums(source, groups)
    detail = DetailSums(source.config, sums) if expert_details else None
    parts = row_slices(len(tokens), chunk)
    wanda = expert_details and finish
    visit = partial(counter(_visits(source, len(parts), gradients, wanda), on_step), 1)
    for part in parts:
        some = None if counted is None else counted[part]
        text = in_batches(source, tokens[part], valid[part], batch, some)
        _add_chunk(source, text, sums, dtype, gradients, scratch, detail, visit)
    more = {"similarity": detail.similarity} if detail else {}
    statistics = ChannelStatistics.from_arrays(sums | more)
    return with_wanda(source, statistics, visit) if wanda else statistics


def with_wanda(
    source: LayerSource, statistics: ChannelStatistics, visit: Visit = lambda: None
) -> ChannelStatistics:
    """Add the sums that need the finished input norms, by reading the layers once more.

    Args:
      source: the model the statistics are of.
      statistics: with details of the experts.
      visit: called after each layer.

    Returns:
      The statistics with `wanda_up` and `wanda_gate`.
    """
    assert statistics.input_square is not None
    found = {name: np.zeros(statistics.hidden_square.shape) for name in ("wanda_up", "wanda_gate")}
    slots = _slots(source)
    for index in range(len(source)):
        if index in slots:
            slot = slots[index]
            sums = wanda_sums(source.layer(index), statistics.input_square[slot])
            for name, value in zip(found, sums, strict=True):
                found[name][slot] = value
        visit()
    return statistics.replace(**found)  # type: ignore[attr-defined]


def collect_weights(source: LayerSource, visit: Visit = lambda: None) -> ChannelStatistics:
    """What the weights alone say: statistics over no token, for plans without calibration text.

    Args:
      source: the dense model.
      visit: called after each layer.

    Returns:
      Statistics whose sums are all zero, with `noise`.
    """
    sums = _empty_sums(source, ())
    rows, worth = noise_rows(source.config.d_model), np.zeros(sums["down_norm"].shape)
    for slot, index in enumerate(source.config.moe_layers):
        layer = source.layer(index)
        _weight_facts(layer, sums, slot)
        worth[slot] = noise_worth(layer, rows)
        visit()
    return ChannelStatistics.from_arrays({**sums, "noise": worth})


def _empty_sums(source: LayerSource, groups) -> Sums:
    config = source.config
    if not config.moe_layers:
        raise InputError("the model has no layer with experts; there is nothing to prune")
    moe = config.moe
    sizes = (len(config.moe_layers), moe.num_experts, moe.d_expert, config.d_model)
    shapes = field_shapes(*sizes, groups, finished=False)
    return {name: np.zeros(shape) for name, shape in shapes.items()}


def _visits(source: LayerSource, chunks: int, gradients: bool, wanda: bool) -> int:
    """How many layers all sweeps read: those of chunks, backward ones, and of `with_wanda`."""
    backward = len(source) - source.config.moe_layers[0] if gradients else 0
    return chunks * (len(source) + backward) + wanda * len(source)


def _add_chunk(
    source: LayerSource,
    text: Batches,
    sums: Sums,
    dtype,
    gradients: bool,
    scratch: Path | None,
    detail: DetailSums | None,
    visit: Visit,
) -> None:
    """Add what some windows give: forward, and backward if gradients are asked for."""
    shape = text.tokens.shape
    kept = nullcontext()
    if gradients:
        room = projection_room(source.config, len(text.rows), text.tokens[text.rows[0]].size)
        kept = States(source, shape, dtype, scratch, room)
    with kept as states:
        last = _forward_sweep(source, text, sums, dtype, states, detail, visit)
        if states is not None:
            _backward_sweep(source, text, sums, last, states, visit)
    sums["total_tokens"] += text.valid.sum()


def _forward_sweep(
    source: LayerSource,
    text: Batches,
    sums: Sums,
    dtype,
    states: States | None,
    detail: DetailSums | None,
    visit: Visit,
) -> list[np.ndarray]:
    """Add the forward sums, keep `states` if there are any; returns the last hidden states."""
    slots, own = _slots(source), tuple(STATISTICS.items())

    def step(index: int, layer: DecoderLayer, x: list[np.ndarray]) -> list[np.ndarray]:
        slot = slots.get(index)
        if slot is not None:
            _weight_facts(layer, sums, slot)

        def run(before: Array, place: Context, rows: slice) -> Array:
            keep = states is not None and slot is not None and states.room > 0
            middle, out, batch_sums, kept = layer_statistics(layer, before, place, keep, own)
            if states is not None:
                states.put(index, rows, before, middle)
                if keep:
                    states.keep(index, rows, kept)
            if slot is not None:
                _add_batch(sums, slot, batch_sums)
                if detail is not None:
                    detail.add(slot, layer, middle, out, place)
            return out

        return text.each(x, run)

    x = text.embedded(source, dtype)
    return sweep(source, x, step, on_layer=lambda index: visit())


def _add_batch(sums: Sums, slot: int, batch_sums: dict[str, Array]) -> None:
    values = {name: np.asarray(value, np.float64) for name, value in batch_sums.items()}
    values["energy"] = values.pop("unit_energy") * np.square(sums["down_norm"][slot])
    for name, value in values.items():
        sums[name][slot] += value


def _backward_sweep(
    source: LayerSource,
    text: Batches,
    sums: Sums,
    last: list[np.ndarray],
    states: States,
    visit: Visit,
) -> None:
    slots = _slots(source)
    lowest = source.config.moe_layers[0]  # below it nothing is scored

    def add_loss(loss: float) -> None:
        sums["loss_sum"] += loss

    def step(index: int, layer: DecoderLayer, gradient: list[np.ndarray]) -> list[np.ndarray]:
        def run(d_out: Array, place: Context, rows: slice) -> Array:
            x, middle = states.get(index, rows)
            kept = states.take(index, rows)
            d_middle, scores = feed_forward_backward(layer, middle, place, d_out, kept)
            if scores is not None:
                values = np.asarray(scores, np.float64)
                for name, value in zip(GRADIENT_SCORES, values, strict=True):
                    sums[name][slots[index]] += value
            return attention_backward(layer, x, place, d_middle) if index > lowest else d_middle

        return text.each(gradient, run)

    down = reversed(range(lowest, len(source)))
    gradient = loss_gradient(source.head, text, last, add_loss)
    sweep(source, gradient, step, layers=down, on_layer=lambda index: visit())


def _slots(source: LayerSource) -> dict[int, int]:
    """Place of each layer with experts among these."""
    return {layer: slot for slot, layer in enumerate(source.config.moe_layers)}


def _weight_facts(layer: DecoderLayer, sums: Sums, slot: int) -> None:
    assert isinstance(layer.mlp, MoE)
    experts = layer.mlp.experts
    shape = sums["down_norm"].shape[1:]
    if bool(np.any(np.asarray(experts.count) != shape[1])):
        raise InputError(
            f"expert widths {np.asarray(experts.count).tolist()} differ from d_expert={shape[1]}; "
            "score the dense model, then plan every budget from its statistics"
        )
    weights = {"down": experts.w_down, "up": experts.w_up, "gate": experts.w_gate}
    for name, weight in weights.items():
        norm, mass = _row_facts(weight)
        sums[f"{name}_norm"][slot] = np.asarray(norm).reshape(shape)
        sums[f"{name}_l1"][slot] = np.asarray(mass).reshape(shape)


@jax.jit
def _row_facts(weight: Weight) -> tuple[Array, Array]:  # [C, D] -> float32 [C], [C]
    wide = dequantize(weight).astype(jnp.float32)
    return jnp.sqrt(jnp.sum(jnp.square(wide), axis=-1)), jnp.sum(jnp.abs(wide), axis=-1)
