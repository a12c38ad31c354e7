"""What an expert is worth to the end-to-end loss: attributions that need more than one sweep.

Every one is an estimate of the loss increase when the expert's output is zeroed, in nats summed
over the text. They differ in how far from the dense model they look, and in what they cost.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.errors import InputError
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.pool import Experts
from moe_jax.experts.run import RunExperts, run_experts
from moe_jax.experts.weights import row_expert
from moe_jax.stream import (
    Batches,
    LayerSource,
    in_batches,
    layer_attend,
    layer_feed_forward,
    layer_forward,
    sweep,
)
from moe_jax.transformer import DecoderLayer
from pruning.kit.progress import OnStep, counter
from pruning.scores.ablation import Ablation, ablate
from pruning.scores.layer import layer_backward, loss_gradient
from pruning.scores.states import States, layer_slots, temporary_states

Count = Callable[[int], None]


def gated(gate: Array) -> RunExperts:
    """Run the experts with their outputs multiplied by `gate` float32 [E]; differentiable."""

    def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
        return run_experts(experts, x, row_weight * gate[row_expert(dispatch)], dispatch)

    return run


# --- every expert taken out ---


def nll_ablate(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    counted: np.ndarray | None = None,
    *,
    reroute: bool = False,
    batch: int = 8,
    dtype=jnp.float32,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Loss without each expert minus the loss: the yard-stick itself.

    Args:
      source: the dense model.
      tokens: int32 [B, T].
      valid: bool [B, T].
      counted: bool [B, T], tokens whose prediction counts in the loss; default all.
      reroute: the router chooses among the others, as after removal, instead of the paper's
        masked output.
      batch: sequences per step.
      dtype: of the activations.
      on_step: receives (layer visits done, layer visits in all).

    Returns:
      float64 [L, E], in nats summed over the text.

    Source: "true" attribution of arXiv 2606.18304, figure 2.
    """
    ablations = every_expert(source, reroute=reroute)
    dense, losses = ablate(
        source,
        tokens,
        valid,
        ablations,
        counted=counted,
        batch=batch,
        dtype=dtype,
        on_step=on_step,
    )
    return (losses - dense).reshape(len(source.config.moe_layers), -1)


def every_expert(source: LayerSource, *, reroute: bool = False) -> list[Ablation]:
    """An ablation for each expert, layer by layer."""
    c = source.config
    experts = range(c.moe.num_experts)
    return [Ablation(index, e, reroute=reroute) for index in c.moe_layers for e in experts]


# --- integrated gradients, layer by layer ---


def nll_ig(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    counted: np.ndarray | None = None,
    *,
    steps: int = 4,
    batch: int = 8,
    chunk: int | None = None,
    dtype=jnp.float32,
    scratch: Path | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Integrated gradient of the loss along the fading of one layer's experts.

    The gates of all experts of a layer stand at (k - 1/2) / K for k = 1..K, those of other layers
    at 1; the attribution is minus the mean gradient at the expert's gate. Over a layer it sums to
    the loss without the layer's experts minus the loss, but for the error of the midpoint rule.

    Args:
      source: the dense model, in memory or on disk.
      tokens: int32 [B, T].
      valid: bool [B, T].
      counted: bool [B, T], tokens whose prediction counts in the loss; default all.
      steps: K; 4 is what the design's experiment used.
      batch: sequences per step.
      chunk: sequences that go through the layers together; for each chunk and each layer with
        experts the layers from there on are read forwards and backwards. Default 64 / K, whose
        hidden states take as much room as those of the sweep with gradients.
      dtype: of the activations.
      scratch: folder of hidden states that do not fit in memory; default the system's.
      on_step: receives (layer visits done, layer visits in all).

    Returns:
      float64 [L, E], in nats summed over the text.

    Raises:
      InputError: `steps` is below 1.
      FullDiskError: there is no room in the scratch folder.

    Source: integrated gradients, arXiv:1703.01365.
    """
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1; 4 is enough for ranks")
    chunk = chunk or ig_chunk(steps)
    starts = range(0, len(tokens), chunk)
    count = counter(ig_visits(source, steps) * len(starts), on_step)
    sums = np.zeros((len(source.config.moe_layers), source.config.moe.num_experts))
    for start in starts:
        part = slice(start, start + chunk)
        some = None if counted is None else counted[part]
        text = in_batches(source, tokens[part], valid[part], batch, some)
        with _fading(source, text, steps, dtype, scratch, count) as fading:
            _add_chunk(sums, source, text, fading, dtype, count)
    return sums


def ig_chunk(steps: int) -> int:
    """Windows that `nll_ig` takes through the layers together, once for each step."""
    return max(1, 64 // steps)


def ig_visits(source: LayerSource, steps: int) -> int:
    """Layer visits of `nll_ig` for one chunk; a plain forward pass has one per layer."""
    layers = len(source)
    return layers + 2 * steps * sum(layers - index for index in source.config.moe_layers)


def _add_chunk(
    sums: np.ndarray, source: LayerSource, text: Batches, fading: "_Fading", dtype, count: Count
) -> None:
    slots = {layer: slot for slot, layer in enumerate(source.config.moe_layers)}

    def step(index: int, layer: DecoderLayer, x: list[np.ndarray]) -> list[np.ndarray]:
        if index in slots:
            sums[slots[index]] -= fading.gate_gradient(index, x) / fading.steps
        return text.each(x, lambda x, place, rows: layer_forward(layer, x, place))

    sweep(source, text.embedded(source, dtype), step, on_layer=lambda index: count(1))


@dataclass(frozen=True, eq=False)
class _Fading:
    """The rest of a model from one faded layer on: all steps of the path go through together.

    Attributes:
      text: the batches of a chunk, once for each step.
      steps: of the path.
      states: where the way up leaves what the way down needs.
      count: counts passes of the chunk through a layer.
    """

    source: LayerSource
    text: Batches
    steps: int
    states: States
    count: Count

    def gate_gradient(self, faded: int, dense: list[np.ndarray]) -> np.ndarray:
        """Gradient [E] at the gates of layer `faded`, summed over steps, from its inputs."""
        source, text, states = self.source, self.text, self.states
        found = np.zeros(source.config.moe.num_experts)

        def up(index: int, layer: DecoderLayer, x: list[np.ndarray]) -> list[np.ndarray]:
            def run(x: Array, place: Context, rows: slice) -> Array:
                middle = layer_attend(layer, x, place)
                states.put(2 * index, rows, x)
                states.put(2 * index + 1, rows, middle)
                if index == faded:
                    return _faded(layer, middle, place, self._gate(rows))
                return layer_feed_forward(layer, middle, place)

            return text.each(x, run)

        def down(index: int, layer: DecoderLayer, gradient: list[np.ndarray]) -> list[np.ndarray]:
            def run(d_out: Array, place: Context, rows: slice) -> Array:
                halves = (states.get(2 * index + half, rows) for half in (0, 1))
                before, middle = map(jnp.asarray, halves)
                if index > faded:
                    return layer_backward(layer, before, middle, place, d_out)
                d_gate = _gate_gradient(layer, middle, place, self._gate(rows), d_out)
                found[:] += np.asarray(d_gate, np.float64)
                return d_out

            return text.each(gradient, run)

        layers, tell = range(faded, len(source)), lambda index: self.count(self.steps)
        last = sweep(source, dense * self.steps, up, layers=layers, on_layer=tell)
        gradient = loss_gradient(source.head, text, last)
        sweep(source, gradient, down, layers=reversed(layers), on_layer=tell)
        return found

    def _gate(self, rows: slice) -> Array:  # [E]
        """Where the gates stand in a batch: its step is the one whose copy it is of."""
        step = rows.start // (len(self.text.tokens) // self.steps)
        experts = self.source.config.moe.num_experts
        return jnp.full(experts, (step + 0.5) / self.steps, jnp.float32)


@contextmanager
def _fading(
    source: LayerSource, text: Batches, steps: int, dtype, scratch: Path | None, count: Count
) -> Iterator[_Fading]:
    tokens, valid = (np.tile(rows, (steps, 1)) for rows in (text.tokens, text.valid))
    counted = None if text.counted is None else np.tile(text.counted, (steps, 1))
    batch = text.rows[0].stop
    copies = in_batches(source, tokens, valid, batch, counted)
    shape = (*tokens.shape, source.config.d_model)
    with temporary_states(layer_slots(source.config), shape, dtype, scratch) as states:
        yield _Fading(source, copies, steps, states, count)


@jax.jit
def _faded(layer: DecoderLayer, middle: Array, context: Context, gate: Array) -> Array:
    return layer.feed_forward(middle, context, gated(gate))[0]


@jax.jit
def _gate_gradient(
    layer: DecoderLayer, middle: Array, context: Context, gate: Array, d_out: Array
) -> Array:  # [E]
    return jax.vjp(lambda gate: _faded(layer, middle, context, gate), gate)[1](d_out)[0]
