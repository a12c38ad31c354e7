"""What a recovery takes of memory and disk, from shapes alone."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from moe_jax.config import ModelConfig
from moe_jax.mesh import specs
from moe_jax.transformer import DecoderLayer
from pruning.recipe.recover_options import RecoverOptions
from pruning.recovery.deltas import DeltaConfig, Deltas, init_deltas

CHECKPOINT = 2 * 16 + 4  # bytes for each number that is trained: two checkpoints, and the result


def trained_shapes(layer: DecoderLayer, config: DeltaConfig) -> Deltas:
    """The changes of a layer without their numbers."""
    return jax.eval_shape(lambda one, key: init_deltas(one, config, key), layer, jax.random.key(0))


def needed_memory(
    layers: Iterable[DecoderLayer],
    c: ModelConfig,
    config: DeltaConfig,
    options: RecoverOptions,
    tokens: int,
    window: int,
    places: int = 1,
    parts: int = 1,
) -> tuple[int, int]:
    """(bytes that training takes, of a device where several share it; numbers that it trains).

    Adam keeps two numbers for each that is trained; with the numbers themselves, their gradient,
    the best of them and those that are made of them that is six. A layer's changed weights, their
    gradient and what is on its way are float32, three at once.

    Args:
      layers: of the student, or their shapes; each is looked at once.
      c: the architecture.
      config: of the changes.
      options: filled.
      tokens: trained on and held out, padding too.
      window: tokens.
      places: devices that windows are dealt to.
      parts: devices that share the experts of a layer.
    """
    weights, trained, own, widest = [], [], [], 0
    for layer in layers:
        shapes = trained_shapes(layer, config)
        weights.append(_share(layer, parts, lambda leaf: leaf.size * leaf.dtype.itemsize))
        trained.append(_share(shapes, 1, lambda leaf: leaf.size))
        own.append(_share(shapes, parts, lambda leaf: leaf.size))
        widest = max(widest, _share(layer, parts, lambda leaf: leaf.size))
    batch = -(-options.batch // places) * window
    outer = 2 * c.vocab_size * c.d_model * (1 if c.tie_embeddings else 2)
    layer_bytes = 3 * 4 * widest + 40 * batch * c.d_model * c.moe.experts_per_token
    if options.mode == "layer":
        streams = 3 * 4 * tokens * c.d_model  # before and behind the layer, dense and student's
        each = 2 * max(weights) + 24 * max(own) + layer_bytes
        return outer + each + 4 * sum(trained) + streams, sum(trained)
    kept = 4 * batch * c.d_model * len(weights) * (1 if options.remat else 20)
    logits = 3 * 4 * window * c.vocab_size
    needed = outer + sum(weights) + 24 * sum(own) + layer_bytes + kept + logits
    return needed, sum(trained)


def _share(tree: Any, parts: int, size: Callable[[Any], int]) -> int:
    """Sum of the sizes of all arrays, of experts those of one of so many devices."""
    where = jax.tree.map(lambda spec: parts if len(spec) else 1, specs(tree))
    each = jax.tree.map(lambda leaf, shared: -(-size(leaf) // shared), tree, where)
    return sum(jax.tree.leaves(each))
