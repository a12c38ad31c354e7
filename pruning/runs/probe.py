"""A short measurement from which the time of a whole sweep is foretold."""

import math
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.grouped_matmul import dot
from moe_jax.groups import own_experts
from moe_jax.source import LayerSource, group_of, groups_of
from moe_jax.stream import in_batches
from moe_jax.transformer import DecoderLayer
from pruning.budget.candidates import CANDIDATES
from pruning.demo import demo_texts
from pruning.recipe.plan_options import AUTO
from pruning.recipe.recipe import ResolvedRecipe
from pruning.scores import grams
from pruning.scores.elimination import eliminate
from pruning.scores.grams import sample_size
from pruning.scores.layer import layer_statistics
from pruning.scores.noise import noise_rows, noise_worth
from pruning.scores.parts import rows_of_parts, windows_at_work
from pruning.scores.weight_facts import weight_facts
from pruning.shrink.masked_layer import masked_forward, masked_layer
from pruning.shrink.taken_over import moved
from pruning.stages.extra_scores import costs
from pruning.stages.rule_losses import SHARE, is_repaired
from pruning.text.kept_out import kept_out_size

PROBE_TOKENS = 512  # of what needs no step as long as that of the sweep
MOST_TOKENS = 8192  # of a step at most
ENOUGH = 2.0  # seconds of runs, of which the quickest counts
# Times the plain sweep: gradients by tests/bench/bench_statistics.py, others as options say.
TIMES = {"gradients": 2.5, "expert_details": 2.0, "weight_gradients": 5.0}
PROBE_WIDTH = 512  # channels at most, by which the time to eliminate those of an expert is told


def scoring_seconds(source: LayerSource, recipe: ResolvedRecipe) -> float:
    """Seconds that scoring will take, from one layer with experts on a few hundred tokens.

    Args:
      source: the dense model.
      recipe: a resolved one.

    Returns:
      An estimate: waiting for a disk, jax's start and compilation come on top.
    """
    if recipe.weights_only:
        layer, times = _probed(source)
        noise = noise_rows(source.config.d_model)
        seconds = _seconds(noise_worth, layer, noise[:PROBE_TOKENS])
        return times * seconds * len(noise) / PROBE_TOKENS * len(source.config.moe_layers)
    sweep = _sweep(source, recipe) * _padded_tokens(recipe)
    asked = [1.0, *(times - 1 for name, times in TIMES.items() if getattr(recipe, name))]
    extra = sum(costs(source, recipe).values()) / len(source)
    obs = _eliminating(source, recipe) if recipe.obs else 0.0
    return sweep * (sum(asked) + extra) + obs + _facts(source) + _reading(source)


def choosing_seconds(source: LayerSource, recipe: ResolvedRecipe) -> float:
    """Seconds that planner auto will take to measure its rules, by the same layer; 0 without it.

    Args:
      source: the dense model.
      recipe: a resolved one.
    """
    tokens = kept_out_tokens(recipe)
    if not tokens:
        return 0.0
    seconds = forward_seconds(source, recipe) * (1 + len(CANDIDATES)) * tokens
    if not is_repaired(recipe):
        return seconds
    windows = math.ceil(recipe.max_tokens / recipe.window)
    sample = math.prod(sample_size(windows, recipe.window, SHARE))
    return seconds + _sweep(source, recipe) * sample + len(CANDIDATES) * _taking_over(source)


def _eliminating(source: LayerSource, recipe: ResolvedRecipe) -> float:
    """Seconds that obs takes beside the sweep: Grams of the tokens of a sample at their experts,
    and the elimination of all channels, whose time grows with the cube of an expert's width."""
    moe, windows = source.config.moe, math.ceil(recipe.max_tokens / recipe.window)
    tokens = math.prod(sample_size(windows, recipe.window, grams.SHARE)) * moe.experts_per_token
    rows = jnp.ones((PROBE_TOKENS, moe.d_expert))
    seconds = _seconds(jax.jit(lambda h: dot(h, h, grams.COLUMNS)), rows) * tokens / PROBE_TOKENS
    width = min(moe.d_expert, PROBE_WIDTH)
    down = np.ones((width, source.config.d_model))
    times = moe.num_experts * (moe.d_expert / width) ** 3
    return len(source.config.moe_layers) * (
        seconds + times * _seconds(eliminate, np.eye(width), down)
    )


def _taking_over(source: LayerSource) -> float:
    """Seconds in which the kept channels of all experts take over the others, by one expert that
    keeps every second channel."""
    c = source.config
    width = c.moe.d_expert
    down, keep = np.ones((width, c.d_model), np.float32), np.arange(width) % 2 == 0
    seconds = _seconds(moved, np.eye(width), down, keep, width)
    return seconds * c.moe.num_experts * len(c.moe_layers)


def _facts(source: LayerSource) -> float:
    """Seconds of what the weights of all experts say by themselves."""
    layer, times = _probed(source)
    seconds = _seconds(weight_facts, layer, source.config.moe.d_expert)
    return times * seconds * len(source.config.moe_layers)


def _reading(source: LayerSource) -> float:
    """Seconds in which a CPU's cores read all layers from the page cache: that goes on beside, but
    with the same cores."""
    if jax.default_backend() != "cpu":
        return 0.0
    _probed(source)  # now it is in the cache
    started = time.perf_counter()
    _, times = _probed(source)
    return times * (time.perf_counter() - started) * len(source)


def _sweep(source: LayerSource, recipe: ResolvedRecipe) -> float:
    """Seconds in which a token goes through all layers for the statistics, by one of them."""
    x, context = _step(source, recipe)
    layer, times = _probed(source)
    seconds = times * _seconds(layer_statistics, layer, x, context)
    return seconds / (x.shape[0] * x.shape[1]) * len(source)


def _probed(source: LayerSource) -> tuple[DecoderLayer, int]:
    """A layer with experts, or of one that is taken in groups the first, and how many there are."""
    index = source.config.moe_layers[0]
    return group_of(source, index, 0), groups_of(source, index)


def forward_seconds(source: LayerSource, recipe: ResolvedRecipe) -> float:
    """Seconds that a token takes through all layers, by one of them.

    Args:
      source: the dense model.
      recipe: a resolved one.
    """
    layer, times = _probed(source)
    own = own_experts(layer)
    keep = jnp.ones((own.stop - own.start, source.config.moe.d_expert), bool)
    x, context = _step(source, recipe)
    seconds = times * _seconds(masked_forward, masked_layer(layer, keep), x, context)
    return seconds / (x.shape[0] * x.shape[1]) * len(source)


def kept_out_tokens(recipe: ResolvedRecipe) -> int:
    """Tokens that planner auto keeps out of a text as long as may be; 0 where it measures none."""
    if recipe.planner != AUTO or recipe.weights_only:
        return 0
    windows = math.ceil(recipe.max_tokens / recipe.window)
    files = recipe.calibration or (demo_texts("calibration") if recipe.model == "demo" else ())
    return math.prod(kept_out_size(windows, recipe.window, len(files)))


def _at_work(recipe: ResolvedRecipe) -> tuple[int, int]:
    """(windows per step of the sweep, windows in all)."""
    windows = math.ceil(recipe.max_tokens / recipe.window)
    return windows_at_work(rows_of_parts(windows, recipe.until_stable is not None), recipe.batch)


def _padded_tokens(recipe: ResolvedRecipe) -> int:
    """Tokens that go through the layers, those of padding to whole steps included."""
    return _at_work(recipe)[1] * recipe.window


def _step(source: LayerSource, recipe: ResolvedRecipe) -> tuple[Array, Context]:
    """The tokens of a step of the sweep [B, T, D] at their places: with fewer, more of the time is
    that of an expert's weights."""
    length = min(recipe.window, MOST_TOKENS)
    rows = max(1, min(_at_work(recipe)[0], MOST_TOKENS // length))
    valid = np.ones((rows, length), bool)
    (context,) = in_batches(source, np.zeros(valid.shape, np.int32), valid, rows).places
    x = jax.random.normal(jax.random.key(0), (*valid.shape, source.config.d_model), jnp.float32)
    return x.astype(recipe.dtype), context


def _seconds(function: Callable, *arguments) -> float:
    """The least of up to three runs after one that compiles."""
    jax.block_until_ready(function(*arguments))
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < ENOUGH:
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - started)
    return min(seconds)
