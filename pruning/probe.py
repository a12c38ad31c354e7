"""A short measurement from which the time of a whole sweep is foretold."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.stream import LayerSource, contexts
from pruning.attribution import layer_statistics
from pruning.extra_scores import costs
from pruning.recipe import CompressionRecipe

PROBE_TOKENS = 512
# Times the plain sweep: gradients by tests/bench/bench_statistics.py, the others as recipe.py says.
TIMES = {"gradients": 2.5, "expert_details": 2.0, "weight_gradients": 5.0}


def scoring_seconds(source: LayerSource, recipe: CompressionRecipe) -> float:
    """Seconds that scoring will take, from one layer with experts on a few hundred tokens.

    Args:
      source: the dense model.
      recipe: a resolved one.

    Returns:
      An estimate: reading weights, compilation and other programs come on top.
    """
    if recipe.weights_only:
        return 0.0
    assert recipe.window is not None
    length = min(recipe.window, PROBE_TOKENS)
    rows = max(1, min(recipe.batch, PROBE_TOKENS // length))
    layer = source.layer(source.config.moe_layers[0])
    valid = np.ones((rows, length), bool)
    (context,) = contexts(source, valid, rows)
    x = jax.random.normal(jax.random.key(0), (*valid.shape, source.config.d_model), jnp.float32)
    x = x.astype(recipe.dtype)
    jax.block_until_ready(layer_statistics(layer, x, context))  # compiles
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready(layer_statistics(layer, x, context))
        seconds.append(time.perf_counter() - started)
    sweep = min(seconds) / valid.size * recipe.max_tokens * len(source)
    asked = [1.0, *(times - 1 for name, times in TIMES.items() if getattr(recipe, name))]
    extra = sum(costs(source, recipe).values()) / len(source)
    return sweep * (sum(asked) + extra)
