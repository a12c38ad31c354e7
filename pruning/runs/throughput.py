"""Figure 10 of the paper: how fast the experts of one layer are at widths of several blocks."""

import dataclasses
import statistics as numbers
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from pruning.budget.decide import plan_pruning
from pruning.budget.rules import RULES
from pruning.kit.progress import OnStep, Steps
from pruning.report.paper import Timed
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.prune import pruned_layer
from pruning.stages.job import Job

TOKENS, REPEATS = 2048, 7
RULE = "paper-act"


def timed_layer(job: Job) -> int:
    """The layer that is timed: with experts, in the middle of them."""
    layers = job.base.config.moe_layers
    return layers[len(layers) // 2]


def timed_blocks(
    job: Job,
    statistics: ChannelStatistics,
    rates: Sequence[float],
    blocks: Sequence[int],
    steps: Steps,
) -> list[Timed]:
    """Time the experts of one layer, dense and under plans of the paper's rule.

    Args:
      job: with the dense model.
      statistics: of its calibration text.
      rates: prune rates.
      blocks: that widths are multiples of; those that no plan can keep to are said and left out.
      steps: where progress goes.

    Returns:
      The dense layer, then each rate and block; all are in memory at once. Attention is not
      timed: it is as it was.
    """
    index, c = timed_layer(job), job.base.config
    layer = job.base.layer(index)
    states = jax.random.normal(jax.random.key(0), (TOKENS, c.d_model), jnp.float32)
    states = states.astype(job.dtype)  # [N, D], as behind a norm
    assert isinstance(layer.mlp, MoE)
    experts = {(0.0, 0): layer.mlp}
    for rate, block in ((rate, block) for rate in rates for block in blocks):
        options = dataclasses.replace(RULES[RULE].options, prune_rate=rate, block=block)
        try:
            plan = plan_pruning(
                statistics, options, experts_per_token=c.moe.experts_per_token,
                layer_indices=c.moe_layers,
            )  # fmt: skip
        except InputError as error:
            steps.say(f"block {block} at {rate:.4g} is left out of figure 10: {error}")
            continue
        pruned = pruned_layer(index, layer, plan).mlp
        assert isinstance(pruned, MoE)
        experts[rate, block] = pruned
    with steps.bar("time a layer") as on_step:
        return _timed(experts, states, on_step)


@jax.jit
def _experts(moe: MoE, states: Array) -> Array:
    return moe(states, jnp.ones(len(states), bool))[0]


def _timed(experts: dict[tuple[float, int], MoE], states: Array, on_step: OnStep) -> list[Timed]:
    """Time all in turns, so that what else the machine does meets each of them alike."""
    speeds: dict[tuple[float, int], list[float]] = {place: [] for place in experts}
    for moe in experts.values():
        jax.block_until_ready(_experts(moe, states))  # compiles
    for turn in range(REPEATS):
        for place, moe in experts.items():
            started = time.perf_counter()
            jax.block_until_ready(_experts(moe, states))
            speeds[place].append(len(states) / (time.perf_counter() - started))
        on_step(turn + 1, REPEATS)
    found = []
    for (rate, block), own in speeds.items():
        low, middle, high = numbers.quantiles(own, n=4, method="inclusive")
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(experts[rate, block].experts))
        three = round(middle, 1), round(low, 1), round(high, 1)
        found.append(Timed(rate, block, three, int(size)))
    return found
