"""Our forward pass against transformers on CPU: same weights, same tokens, same process.

Run by hand from the repository root: `python tests/bench/bench_forward.py`.
"""

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

SIZES = {
    "vocab_size": 512,
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
BATCH, LENGTH, ROUNDS = 4, 512, 7

forward = jax.jit(lambda model, tokens: model(tokens))


def made_model() -> transformers.PreTrainedModel:
    """A random Qwen3-MoE in float32."""
    config = transformers.AutoConfig.for_model("qwen3_moe", **SIZES)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def ways(folder: Path, dtype: str, tokens: np.ndarray) -> dict:
    """Name -> a call that returns float32 logits [B, T, V]."""
    ids = torch.from_numpy(tokens).long()
    ours = load_model(folder, dtype=jnp.dtype(dtype))

    def theirs(implementation: str):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), experts_implementation=implementation
        ).eval()

        @torch.no_grad()
        def call() -> np.ndarray:
            return model(ids).logits.float().numpy()

        return call

    return {
        "moe_jax": lambda: np.asarray(forward(ours, tokens)),
        "torch grouped_mm": theirs("grouped_mm"),
        "torch eager": theirs("eager"),
    }


def main() -> None:
    """Print seconds of process CPU time and of wall time, best of the rounds, and ratios."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokens = np.random.default_rng(0).integers(0, 512, (BATCH, LENGTH)).astype(np.int32)
    print(f"{tokens.size} tokens, {torch.get_num_threads()} torch threads, best of {ROUNDS}")
    print(f"{'':10}{'':18}{'CPU s':>8}{'wall s':>8}{'CPU ratio':>11}{'median |d logit|':>18}")
    with tempfile.TemporaryDirectory() as folder:
        made_model().save_pretrained(folder)
        for dtype in ("float32", "bfloat16"):
            calls = ways(Path(folder), dtype, tokens)
            exact = calls["torch eager"]()
            cpu, wall, error = dict.fromkeys(calls, 9e9), dict.fromkeys(calls, 9e9), {}
            for name, call in calls.items():  # compiles
                error[name] = float(np.median(np.abs(call() - exact)))
            for _ in range(ROUNDS):
                for name, call in calls.items():  # interleaved: a busy machine slows all alike
                    start, start_wall = time.process_time(), time.perf_counter()
                    call()
                    cpu[name] = min(cpu[name], time.process_time() - start)
                    wall[name] = min(wall[name], time.perf_counter() - start_wall)
            for name in calls:
                ratio = cpu[name] / cpu["moe_jax"]
                print(f"{dtype:10}{name:18}{cpu[name]:8.3f}{wall[name]:8.3f}{ratio:11.2f}"
                      f"{error[name]:18.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
