"""Cost of the statistics sweep against the plain forward, in one process."""

import time

import jax
import numpy as np

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.stream import forward_hidden
from moe_jax.transformer import init
from pruning.attribution import collect_statistics

CONFIG = ModelConfig(
    vocab_size=1024,
    d_model=512,
    num_layers=2,
    max_position=512,
    norm_eps=1e-6,
    tie_embeddings=True,
    attention=AttentionConfig(num_heads=8, num_kv_heads=4, head_dim=64),
    moe=MoEConfig(num_experts=32, experts_per_token=4, d_expert=256, renormalize=True),
)


def cpu_seconds(function, repeats: int = 5) -> float:
    """Least processor time of several calls after a warm-up."""
    function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    """Print seconds and ratios."""
    model = init(CONFIG, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 1024, (4, 512)).astype(np.int32)
    valid = np.ones(tokens.shape, bool)
    plain = cpu_seconds(lambda: forward_hidden(model, tokens, valid, batch=4))
    forward = cpu_seconds(lambda: collect_statistics(model, tokens, valid, batch=4))
    both = cpu_seconds(lambda: collect_statistics(model, tokens, valid, batch=4, gradients=True))
    print(f"plain forward   {plain * 1e3:7.0f} cpu ms")
    print(f"statistics      {forward * 1e3:7.0f} cpu ms  {forward / plain:.2f}x")
    print(f"with gradients  {both * 1e3:7.0f} cpu ms  {both / plain:.2f}x")


if __name__ == "__main__":
    main()
