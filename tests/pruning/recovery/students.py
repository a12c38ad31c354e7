"""Small students for tests: experts of different widths, one of them emptied."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.experts.moe import MoE
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer, Transformer, init
from pruning.budget.plan import PruningPlan
from pruning.recovery.course import Course, FitOptions, TrainingText
from pruning.recovery.deltas import DeltaConfig, Deltas
from pruning.recovery.fit import PlacedStudent, begun
from pruning.shrink.prune import PrunedSource

COUNTS = ((32, 0, 64, 32), (64, 32, 32, 64))
CONFIG = ModelConfig(
    vocab_size=48,
    d_model=32,
    num_layers=2,
    max_position=16,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
    moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=64, renormalize=True),
)


def dense_model(config: ModelConfig = CONFIG, scale: float = 12.0) -> Transformer:
    """A random model whose weights are large enough to matter."""
    model = init(config, jax.random.key(3))
    return jax.tree.map(
        lambda leaf: leaf * scale if leaf.ndim == 2 and leaf.dtype == jnp.float32 else leaf, model
    )


def pruned_model(dense: Transformer) -> Transformer:
    """The model without some channels."""
    keep, rng = np.zeros((2, 4, 64), bool), np.random.default_rng(0)
    for place in np.ndindex(2, 4):
        keep[place][rng.permutation(64)[: COUNTS[place[0]][place[1]]]] = True
    source = PrunedSource(dense, PruningPlan(keep, (0, 1), {}))
    return dataclasses.replace(dense, layers=tuple(source.layer(i) for i in range(2)))


def placed_student(source: LayerSource, config: DeltaConfig | None = None) -> PlacedStudent:
    """A student in memory, on one device."""
    config = config or DeltaConfig()
    nothing = TrainingText(*(np.zeros((0, 8), kind) for kind in (np.int32, bool, bool)))
    return begun(source, Course(nothing, nothing, config, FitOptions(learning_rate=1.0)))


def first_deltas(source: LayerSource, config: DeltaConfig) -> Deltas:
    """Changes that change nothing yet."""
    return placed_student(source, config).deltas


def experts_of(layer: DecoderLayer):
    """The routed experts of a layer that has some."""
    assert isinstance(layer.mlp, MoE)
    return layer.mlp.experts


def stirred(deltas, seed: int = 5, size: float = 0.02):
    """Changes as training leaves them: every number moved."""
    leaves, structure = jax.tree.flatten(deltas)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + size * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)
