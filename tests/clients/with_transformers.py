"""Run in the environment of transformers: FOLDER TOKENS.npy OUT.npz -> its logits in float32."""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, out: str) -> None:
    """Load as a user would, run once, write the logits."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        trust_remote_code=True,
        attn_implementation="eager",
        output_loading_info=True,
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"not loaded cleanly: {wrong}")
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(np.load(tokens)).long()).logits
    np.savez(out, logits=found.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
