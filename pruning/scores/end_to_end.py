"""What an expert is worth to the end-to-end loss: attributions that need more than one sweep.

Every one is an estimate of the loss increase when the expert's output is zeroed, in nats summed
over the text. They differ in how far from the dense model they look, and in what they cost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.errors import InputError
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.moe import Experts, MoE, RunExperts
from moe_jax.experts.swiglu import no_score, routed_experts
from moe_jax.stream import LayerSource, contexts, embed, layer_forward, pad_rows
from moe_jax.transformer import DecoderLayer
from pruning.scores.ablation import Ablation, ablate, attend
from pruning.scores.layer import layer_backward, loss_and_gradient
from pruning.scores.states import States, row_slices

OnStep = Callable[[int, int], None]


def gated(gate: Array) -> RunExperts:
    """Run the experts with their outputs multiplied by `gate` float32 [E]; differentiable."""

    def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
        owner = jnp.repeat(dispatch.tile_expert, dispatch.tile)  # [P]
        probe = jnp.zeros((0, experts.count.shape[0], experts.width))
        args = (experts.weights, probe, dispatch, experts.pool)
        return routed_experts(no_score, x, row_weight * gate[owner], *args), None

    return run


# --- every expert taken out ---


def nll_ablate(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
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
        source, tokens, valid, ablations, batch=batch, dtype=dtype, on_step=on_step
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
    *,
    steps: int = 4,
    batch: int = 8,
    chunk: int | None = None,
    dtype=jnp.float32,
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
      steps: K; 4 is what the design's experiment used.
      batch: sequences per step.
      chunk: sequences that go through the layers together; for each chunk and each layer with
        experts the layers from there on are read forwards and backwards. Default 64 / K, whose
        hidden states take as much room as those of the sweep with gradients.
      dtype: of the activations.
      on_step: receives (layer visits done, layer visits in all).

    Returns:
      float64 [L, E], in nats summed over the text.

    Raises:
      InputError: `steps` is below 1.

    Source: integrated gradients, arXiv:1703.01365.
    """
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1; 4 is enough for ranks")
    chunk = chunk or max(1, 64 // steps)
    starts = range(0, len(tokens), chunk)
    total, done = ig_visits(source, steps) * len(starts), 0
    sums = np.zeros((len(source.config.moe_layers), source.config.moe.num_experts))

    def visit(count: int) -> None:
        nonlocal done
        done += count
        if on_step:
            on_step(done, total)

    for start in starts:
        part, mask = (pad_rows(v[start : start + chunk], batch) for v in (tokens, valid))
        x = [embed(source, part[rows], dtype) for rows in row_slices(len(part), batch)]
        places = contexts(source, mask, batch)
        fading = _Fading(source, part, mask, steps, batch, dtype)
        for index in range(len(source)):
            layer = source.layer(index)
            if index in source.config.moe_layers:
                slot = source.config.moe_layers.index(index)
                sums[slot] -= fading.gate_gradient(index, layer, x, visit) / steps
                layer = source.layer(index)
            x = [
                np.asarray(layer_forward(layer, jnp.asarray(a), place))
                for a, place in zip(x, places, strict=True)
            ]
            visit(1)
    return sums


def ig_visits(source: LayerSource, steps: int) -> int:
    """Layer visits of `nll_ig` for one chunk; a plain forward pass has one per layer."""
    layers = len(source)
    return layers + 2 * steps * sum(layers - index for index in source.config.moe_layers)


class _Fading:
    """The rest of the model behind one faded layer: all steps of the path go through together."""

    def __init__(self, source, tokens, valid, steps: int, batch: int, dtype):
        self.source, self.batch = source, batch
        self.levels = np.repeat((np.arange(steps) + 0.5) / steps, len(tokens) // batch)
        self.tokens, self.valid = np.tile(tokens, (steps, 1)), np.tile(valid, (steps, 1))
        self.parts = row_slices(len(self.tokens), batch)
        self.places = contexts(source, self.valid, batch)
        self.states = States(source, self.tokens.shape, dtype)

    def gate_gradient(self, index: int, layer: DecoderLayer, dense, visit) -> np.ndarray:
        """Gradient [E] at the gates of layer `index`, summed over levels, from its inputs."""
        assert isinstance(layer.mlp, MoE)
        x, count = [], layer.mlp.config.num_experts
        for i, rows in enumerate(self.parts):
            before = dense[i % len(dense)]
            middle = attend(layer, jnp.asarray(before), self.places[i])
            self.states.put(index, rows, before, middle)
            level = jnp.full(count, self.levels[i], jnp.float32)
            x.append(np.asarray(_faded(layer, middle, self.places[i], level)))
        steps = len(self.parts) // len(dense)
        visit(steps)
        gradient = self._pull_back(index, self._go_on(index, x, steps, visit), steps, visit)
        layer = self.source.layer(index)
        found = np.zeros(count)
        for i, rows in enumerate(self.parts):
            middle = self.states.get(index, rows)[1]
            level = jnp.full(count, self.levels[i], jnp.float32)
            d_gate = _gate_gradient(layer, middle, self.places[i], level, jnp.asarray(gradient[i]))
            found += np.asarray(d_gate, np.float64)
        visit(steps)
        return found

    def _go_on(self, index: int, x: list[np.ndarray], steps: int, visit) -> list[np.ndarray]:
        for number in range(index + 1, len(self.source)):
            layer = self.source.layer(number)
            for i, rows in enumerate(self.parts):
                before = jnp.asarray(x[i])
                middle = attend(layer, before, self.places[i])
                self.states.put(number, rows, x[i], middle)
                x[i] = np.asarray(_second_half(layer, middle, self.places[i]))
            visit(steps)
        return x

    def _pull_back(self, index: int, x: list[np.ndarray], steps: int, visit) -> list[np.ndarray]:
        head = self.source.head
        gradient = []
        for i, rows in enumerate(self.parts):
            text = jnp.asarray(self.tokens[rows]), jnp.asarray(self.valid[rows])
            d_x = loss_and_gradient(head, jnp.asarray(x[i]), *text)[1]
            gradient.append(np.asarray(d_x))
        for number in reversed(range(index + 1, len(self.source))):
            layer = self.source.layer(number)
            for i, rows in enumerate(self.parts):
                before, middle = self.states.get(number, rows)
                d_out = jnp.asarray(gradient[i])
                d_x = layer_backward(layer, before, middle, self.places[i], d_out)
                gradient[i] = np.asarray(d_x)
            visit(steps)
        return gradient


_second_half = jax.jit(lambda layer, middle, context: layer.feed_forward(middle, context)[0])


@jax.jit
def _faded(layer: DecoderLayer, middle: Array, context: Context, gate: Array) -> Array:
    return layer.feed_forward(middle, context, gated(gate))[0]


@jax.jit
def _gate_gradient(
    layer: DecoderLayer, middle: Array, context: Context, gate: Array, d_out: Array
) -> Array:  # [E]
    half = lambda gate: layer.feed_forward(middle, context, gated(gate))[0]  # noqa: E731
    return jax.vjp(half, gate)[1](d_out)[0]
