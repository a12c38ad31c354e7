"""Cost of the statistics sweep against the plain forward, in one process.

Targets: 1.3 times the plain forward for the statistics, 3 times with gradients.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.stream import forward_hidden
from moe_jax.transformer import init
from pruning.collect import collect_statistics

CONFIG = ModelConfig(
    vocab_size=512,
    d_model=512,
    num_layers=2,
    max_position=256,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64),
    moe=MoEConfig(num_experts=32, experts_per_token=4, d_expert=256, renormalize=True),
)


def main() -> None:
    """Print the ratios."""
    model = init(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 512, (8, 256)).astype(np.int32)
    valid = np.ones(tokens.shape, bool)
    ways = {
        "forward": lambda: forward_hidden(model, tokens, valid),
        "statistics": lambda: collect_statistics(model, tokens, valid),
        "with gradients": lambda: collect_statistics(model, tokens, valid, gradients=True),
    }
    best = {}
    for repeat in range(6):  # the first round compiles
        for name, way in ways.items():  # interleaved, so that a busy machine slows all alike
            start = time.process_time()
            way()
            if repeat:
                best[name] = min(best.get(name, np.inf), time.process_time() - start)
    for name, seconds in best.items():
        print(f"{name:15} {seconds:6.2f} s CPU  {seconds / best['forward']:.2f} x forward")


if __name__ == "__main__":
    main()
