"""The loss of a model without one expert, or without one channel: what proxies are judged by."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

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
from moe_jax.quant import dequantize
from moe_jax.stream import (
    Batches,
    LayerSource,
    in_batches,
    layer_attend,
    layer_forward,
    sweep,
)
from moe_jax.transformer import DecoderLayer, Head, next_token_loss
from pruning.kit.memory import allowance
from pruning.kit.progress import OnStep, counter
from pruning.scores.states import MEMORY_STATES


@dataclass(frozen=True)
class Ablation:
    """One thing to take out of a model.

    Attributes:
      layer: index of the decoder layer.
      expert: index of the expert in it.
      channel: the expert's channel; None for the whole expert.
      reroute: a whole expert only: the router no longer knows it, so that its tokens go to the
        next best, as after physical removal. Otherwise its output is zero and everything else is
        as it was, which is the paper's ablation.
    """

    layer: int
    expert: int
    channel: int | None = None
    reroute: bool = False

    @property
    def key(self) -> tuple[int, int, int, bool]:
        """Sorts by layer, whole experts before channels."""
        return self.layer, self.expert, -1 if self.channel is None else self.channel, self.reroute


def ablate(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    ablations: Sequence[Ablation],
    *,
    counted: np.ndarray | None = None,
    batch: int = 8,
    dtype=jnp.float32,
    memory: int | None = None,
    on_step: OnStep | None = None,
) -> tuple[float, np.ndarray]:
    """Summed next-token loss of the model and of the model without each of some parts.

    An ablated model equals the dense one up to its layer, so that it costs one pass through the
    layers from there on; all ablations go through a layer together while it is in memory.

    Args:
      source: the dense model, in memory or on disk.
      tokens: int32 [B, T].
      valid: bool [B, T].
      ablations: what to take out, one at a time.
      counted: bool [B, T], tokens whose prediction counts in the loss; default all.
      batch: sequences per step.
      dtype: of the activations.
      memory: bytes of hidden states held on the host, default `MEMORY_STATES` or less that the
        run's allowance has; what needs more takes several passes.
      on_step: receives (layer visits done, layer visits in all).

    Returns:
      (loss of the dense model, float64 [A] losses of the ablated ones), in nats.

    Raises:
      InputError: an ablation names a layer, expert or channel that is not there.
    """
    _check(source, ablations)
    text = in_batches(source, tokens, valid, batch, counted)
    size = text.tokens.size * source.config.d_model * jnp.dtype(dtype).itemsize
    memory = allowance().of(MEMORY_STATES) if memory is None else memory
    groups = _groups(ablations, max(1, memory // max(size, 1) - 1))
    visit = counter(sum(layer_visits(ablations, len(source), g) for g in groups), on_step)
    losses, dense = np.zeros(len(ablations)), 0.0
    for group in groups:
        chosen = {number: ablations[number] for number in group}
        dense, found = _pass(source, text, chosen, dtype, visit)
        for number, loss in found.items():
            losses[number] = loss
    return dense, losses


def layer_visits(
    ablations: Sequence[Ablation], layers: int, group: Sequence[int] | None = None
) -> int:
    """Layers that one pass of `ablate` runs the text through; a plain forward pass runs `layers`.

    Args:
      ablations: what is taken out.
      layers: of the model.
      group: the numbers of those of this pass; default all.

    Returns:
      The number of layer visits.
    """
    chosen = ablations if group is None else [ablations[number] for number in group]
    return layers + sum(layers - ablation.layer for ablation in chosen)


def _check(source: LayerSource, ablations: Sequence[Ablation]) -> None:
    config = source.config
    moe = config.moe
    for one in ablations:
        channel = 0 if one.channel is None else one.channel
        if (
            one.layer not in config.moe_layers
            or not 0 <= one.expert < moe.num_experts
            or not 0 <= channel < moe.d_expert
            or (one.reroute and one.channel is not None)
        ):
            raise InputError(
                f"{one} is not in the model, which has {moe.num_experts} experts of {moe.d_expert} "
                f"channels in layers {list(config.moe_layers)}; only whole experts can be rerouted"
            )


def _groups(ablations: Sequence[Ablation], most: int) -> list[list[int]]:
    """Numbers of at most `most` ablations that go together, neighbouring layers together."""
    order = sorted(range(len(ablations)), key=lambda number: ablations[number].key)
    return [order[start : start + most] for start in range(0, len(order), most)] or [[]]


def _pass(
    source: LayerSource,
    text: Batches,
    chosen: dict[int, Ablation],
    dtype,
    visit: Callable[[int], None],
) -> tuple[float, dict[int, float]]:
    """Dense loss and the losses of the chosen ablations, by their numbers."""
    states: dict[int, list[np.ndarray]] = {}  # of the ablated models behind their layers

    def step(index: int, layer: DecoderLayer, dense: list[np.ndarray]) -> list[np.ndarray]:
        def forward(x: Array, place: Context, rows: slice) -> Array:
            return layer_forward(layer, x, place)

        for x in states.values():
            text.each(x, forward)
        here = {number: one for number, one in chosen.items() if one.layer == index}
        states.update({number: [] for number in here})

        def branch(x: Array, place: Context, rows: slice) -> Array:
            for number, out in _ablated(layer, x, place, here):
                states[number].append(np.asarray(out))
            return forward(x, place, rows)

        text.each(dense, branch)
        visit(1 + len(states))
        return dense

    dense = sweep(source, text.embedded(source, dtype), step)
    head = source.head
    return _total(head, dense, text), {n: _total(head, x, text) for n, x in states.items()}


def _total(head: Head, x: list[np.ndarray], text: Batches) -> float:
    def loss(part: np.ndarray, rows: slice) -> float:
        words = (text.tokens, text.valid, text.counted)
        words = [None if one is None else jnp.asarray(one[rows]) for one in words]
        return float(batch_loss(head, jnp.asarray(part), *words))

    return float(sum(map(loss, x, text.rows)))


@jax.jit
def batch_loss(
    head: Head, x: Array, tokens: Array, valid: Array, counted: Array | None = None
) -> Array:  # [B, T, D], [B, T], [B, T], [B, T]
    """Summed next-token loss (nats), one sequence at a time: logits are the largest array."""
    return jax.lax.map(lambda row: next_token_loss(head, *row), (x, tokens, valid, counted)).sum()


def _ablated(
    layer: DecoderLayer, x: Array, place: Context, here: dict[int, Ablation]
) -> Iterator[tuple[int, Array]]:
    """Outputs of a layer without each of some parts of it, from one run of its attention."""
    if not here:
        return
    assert isinstance(layer.mlp, MoE)
    middle, experts = layer_attend(layer, x, place), layer.mlp.experts
    count = np.asarray(experts.count)
    first = np.cumsum(count) - count
    for number, one in here.items():
        if one.reroute:
            alive = np.arange(len(count)) != one.expert
            yield number, rerouted(layer, middle, place, jnp.asarray(alive))
            continue
        keep = np.ones(experts.w_down.shape[0], bool)
        start = first[one.expert] + (one.channel or 0)
        keep[start : start + (count[one.expert] if one.channel is None else 1)] = False
        speaks = np.ones(len(count), bool)  # a whole expert goes with the bias of its output
        speaks[one.expert] = one.channel is not None
        yield number, masked(layer, middle, place, jnp.asarray(keep), jnp.asarray(speaks))


@jax.jit
def masked(
    layer: DecoderLayer, middle: Array, context: Context, keep: Array, speaks: Array
) -> Array:
    """The second half of a layer with the channels of its pool that `keep` [C] leaves, and the
    output biases of the experts that `speaks` [E] leaves."""

    def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
        down, bias = dequantize(experts.w_down), experts.b_down
        bias = None if bias is None else jnp.where(speaks[:, None], bias, 0)
        left = dataclasses.replace(experts, w_down=jnp.where(keep[:, None], down, 0), b_down=bias)
        return run_experts(left, x, row_weight, dispatch)

    return layer.feed_forward(middle, context, run)[0]


@jax.jit
def rerouted(layer: DecoderLayer, middle: Array, context: Context, alive: Array) -> Array:
    """The second half of a layer whose router knows the experts that are `alive` [E]."""
    assert isinstance(layer.mlp, MoE)
    mlp = dataclasses.replace(layer.mlp, alive=alive)
    return dataclasses.replace(layer, mlp=mlp).feed_forward(middle, context)[0]
