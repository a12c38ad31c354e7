"""Run in the environment of xllamacpp: FOLDER TOKENS.npy OUT.npz -> its log-probabilities.

llama.cpp's own converter writes the GGUF file, in float32; of it only the recognition of published
tokenizers is replaced, since a tokenizer made for a test is none of them.
"""

import json
import sys
from pathlib import Path

import numpy as np

LETTER = 68  # "e"


def convert(folder: Path, target: Path, converter: Path) -> None:
    """Run `convert_hf_to_gguf.py --outtype f32`."""
    sys.path[:0] = [str(converter), str(converter / "gguf-py")]
    import convert_hf_to_gguf
    from conversion import base

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert", str(folder), "--outfile", str(target), "--outtype", "f32"]
    if "linear_key_head_dim" in json.loads((folder / "config.json").read_text()):
        sys.argv.append("--no-mtp")  # which exports lack, and the converter looks for
    convert_hf_to_gguf.main()


def next_token(server, prompt: list[int], vocabulary: int) -> np.ndarray:
    """Log-probabilities [V] of what follows a prompt."""
    answer = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": 1,
            "n_probs": vocabulary,
            "temperature": 0.0,
            "cache_prompt": False,
            "post_sampling_probs": False,
            # The server reports nothing for a token that ends amid a character, so let it take a
            # letter; what it reports is before any bias.
            "logit_bias": [[LETTER, 100.0]],
        }
    )
    found = np.full(vocabulary, np.nan, np.float32)
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


def main(folder: str, tokens: str, out: str) -> None:
    """Convert, load, ask for the token after every prefix."""
    import xllamacpp

    gguf = Path(out).with_suffix(".gguf")
    convert(Path(folder), gguf, Path(sys.prefix) / "llama.cpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    found = [
        [next_token(server, row[: t + 1], vocabulary) for t in range(len(row))]
        for row in np.load(tokens).tolist()
    ]
    np.savez(out, logprobs=np.array(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
