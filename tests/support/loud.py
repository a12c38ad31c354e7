"""A small model of which no part is close to doing nothing, and text of unequal lengths for it."""

import jax
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.transformer import Transformer, init


def loud_model(config: ModelConfig) -> Transformer:
    """A random model with weights of order one."""
    model = init(config, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, model)


def unequal_text() -> tuple[np.ndarray, np.ndarray]:
    """Tokens below 64 int32 [5, 10] and which of them are valid."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (5, 10)).astype(np.int32)
    return tokens, np.arange(10)[None] < rng.integers(3, 11, (5, 1))
