"""Run in the environment of transformers: FOLDER TOKENS.npy OUT.npz -> its logits in float32."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM


def main(folder: str, tokens: str, out: str) -> None:
    """Load as a user would, run once, write the logits."""
    config = json.loads((Path(folder) / "config.json").read_text())
    # MXFP4 is dequantised to bfloat16 whatever is asked for, which holds its numbers exactly.
    is_float4 = config.get("quantization_config", {}).get("quant_method") == "mxfp4"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if is_float4 else torch.float32,
        trust_remote_code=True,
        attn_implementation="eager",
        output_loading_info=True,
    )
    wrong = {key: value for key, value in info.items() if value}
    if wrong:
        raise SystemExit(f"not loaded cleanly: {wrong}")
    with torch.no_grad():
        found = model.float().eval()(torch.from_numpy(np.load(tokens)).long()).logits
    np.savez(out, logits=found.float().numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
