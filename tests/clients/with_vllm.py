"""Run in the environment of vLLM's CPU build: FOLDER TOKENS.npy OUT.npz -> log-probabilities."""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import numpy as np
from vllm import LLM, SamplingParams


def main(folder: str, tokens: str, out: str) -> None:
    """Load, score the prompts and the token after each; what follows the last is one generated."""
    config = json.loads((Path(folder) / "config.json").read_text())
    vocabulary = config["vocab_size"]
    rounded = bool({"quantization_config", "linear_key_head_dim"} & config.keys())
    if "auto_map" in config:  # its latent attention knows stock classes only
        os.environ["VLLM_MLA_DISABLE"] = "1"
    model = LLM(
        folder,
        # Some of its kernels for CPUs do not compute in float32.
        dtype="bfloat16" if rounded else "float32",
        trust_remote_code=True,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_logprobs=vocabulary,
    )
    rows = np.load(tokens).tolist()
    settings = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        logprobs=vocabulary,
        prompt_logprobs=vocabulary,
        detokenize=False,
    )
    found = np.full((len(rows), len(rows[0]), vocabulary), np.nan, np.float32)
    for row, answer in enumerate(model.generate([{"prompt_token_ids": r} for r in rows], settings)):
        # entry t of the prompt is what its tokens before t say, and the first has none
        for place, entries in enumerate(
            [*answer.prompt_logprobs[1:], answer.outputs[0].logprobs[0]]
        ):
            for token, entry in entries.items():
                found[row, place, token] = entry.logprob
    np.savez(out, logprobs=found)


if __name__ == "__main__":
    main(*sys.argv[1:])
