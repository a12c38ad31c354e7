"""Cost of the statistics sweep against the plain forward, in one process.

Targets: 1.3 times the plain forward for the statistics, 3 times with gradients. The plain forward
ends at the last hidden states, as the statistics do; gradients need the loss as well, so their
ratio is also given to the forward that ends in it. `--shape qwen3` takes layers of Qwen3-30B-A3B
(32 of their 128 experts, so that they fit; two layers with 2/48 of the vocabulary).
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moe_jax.config import AttentionConfig, ModelConfig, MoEConfig
from moe_jax.stream import forward_hidden
from moe_jax.transformer import init, next_token_loss
from pruning.scores import states
from pruning.scores.collect import collect_statistics
from tests.bench.shapes import SHAPES, Shape


def config_of(shape: Shape) -> ModelConfig:
    """The model's configuration."""
    queries, keys, width = shape.heads
    experts, per_token, d_expert = shape.moe
    return ModelConfig(
        vocab_size=shape.vocab,
        d_model=shape.d_model,
        num_layers=2,
        max_position=512,
        norm_eps=1e-6,
        tie_embeddings=True,
        attention=AttentionConfig(num_heads=queries, num_kv_heads=keys, head_dim=width),
        moe=MoEConfig(
            num_experts=experts, experts_per_token=per_token, d_expert=d_expert, renormalize=True
        ),
    )


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=32, help="of 256 tokens, 8 at a time")
    parser.add_argument("--recompute", action="store_true", help="keep no gate and up rows")
    args = parser.parse_args()
    if args.recompute:
        states.MEMORY_PROJECTIONS = 0
    config = config_of(SHAPES[args.shape])
    model = init(config, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (args.sequences, 256))
    tokens = tokens.astype(np.int32)
    valid = np.ones(tokens.shape, bool)
    losses = jax.jit(
        lambda head, x: jax.lax.map(
            lambda row: next_token_loss(head, *row), (x, tokens, valid)
        ).sum()
    )

    def with_loss() -> None:
        losses(model.head, jnp.asarray(forward_hidden(model, tokens, valid))).block_until_ready()

    ways = {
        "forward": lambda: forward_hidden(model, tokens, valid),
        "forward and loss": with_loss,
        "statistics": lambda: collect_statistics(model, tokens, valid),
        "with gradients": lambda: collect_statistics(model, tokens, valid, gradients=True),
    }
    # Processor time where the processor computes: other jobs do not count.
    on_cpu = jax.default_backend() == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(args.rounds + 1):  # the first round compiles
        for name, way in ways.items():  # interleaved, so that a busy machine slows all alike
            start = clock()
            way()
            if repeat:
                seconds[name].append(clock() - start)
    best = {name: min(values) for name, values in seconds.items()}
    for name, value in best.items():
        print(f"{name:17} {value:6.3f} s  {value / best['forward']:.2f} x forward")
    print(f"gradients: {best['with gradients'] / best['forward and loss']:.2f} x forward and loss")


if __name__ == "__main__":
    main()
