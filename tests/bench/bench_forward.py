"""Our forward pass against transformers: same weights, same tokens, same process, same device.

Run by hand from the repository root: `python tests/bench/bench_forward.py`. `--shape qwen3` takes
two layers of Qwen3-30B-A3B (32 of their 128 experts, 2/48 of the vocabulary). On a GPU times are
those of the wall, on a CPU of the processor: other jobs do not count.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle torch threads would count as CPU time
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from convert import load_model
from tests.bench.shapes import SHAPES

LENGTH, ROUNDS = 512, 7

forward = jax.jit(lambda model, tokens: model(tokens))


def made_model(name: str) -> transformers.PreTrainedModel:
    """A random Qwen3-MoE in float32."""
    shape = SHAPES[name]
    queries, keys, width = shape.heads
    experts, per_token, d_expert = shape.moe
    config = transformers.AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=shape.vocab, hidden_size=shape.d_model, num_hidden_layers=2,
        num_attention_heads=queries, num_key_value_heads=keys, head_dim=width,
        num_experts=experts, num_experts_per_tok=per_token, moe_intermediate_size=d_expert,
        max_position_embeddings=1024, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def ways(folder: Path, dtype: str, tokens: np.ndarray) -> dict:
    """Name -> a call that returns float32 logits [B, T, V]."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    ids = torch.from_numpy(tokens).long().to(device)
    ours = load_model(folder, dtype=jnp.dtype(dtype))

    def theirs(implementation: str):
        model = (
            transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), experts_implementation=implementation
            )
            .eval()
            .to(device)
        )

        @torch.no_grad()
        def call() -> np.ndarray:
            return model(ids).logits.float().cpu().numpy()

        return call

    return {
        "moe_jax": lambda: np.asarray(forward(ours, tokens)),
        "torch grouped_mm": theirs("grouped_mm"),
        "torch eager": theirs("eager"),
    }


def main() -> None:
    """Print the seconds of a forward pass, best of the rounds, and ratios to ours."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--batch", type=int, default=4, help=f"sequences of {LENGTH} tokens")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    vocab = SHAPES[args.shape].vocab
    tokens = np.random.default_rng(0).integers(0, vocab, (args.batch, LENGTH)).astype(np.int32)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    print(f"{jax.devices()[0].device_kind}, {args.shape}, {tokens.size} tokens, best of {ROUNDS}")
    print(f"{'':10}{'':18}{'seconds':>9}{'ratio':>8}{'median |d logit|':>18}")
    with tempfile.TemporaryDirectory() as folder:
        made_model(args.shape).save_pretrained(folder)
        for dtype in ("float32", "bfloat16"):
            calls = ways(Path(folder), dtype, tokens)
            exact = calls["torch eager"]()
            best, error = dict.fromkeys(calls, 9e9), {}
            for name, call in calls.items():  # compiles
                error[name] = float(np.median(np.abs(call() - exact)))
            for _ in range(ROUNDS):
                for name, call in calls.items():  # interleaved: a busy machine slows all alike
                    start = clock()
                    call()
                    best[name] = min(best[name], clock() - start)
            for name, seconds in best.items():
                ratio = seconds / best["moe_jax"]
                print(f"{dtype:10}{name:18}{seconds:9.4f}{ratio:8.2f}{error[name]:18.1e}")


if __name__ == "__main__":
    main()
