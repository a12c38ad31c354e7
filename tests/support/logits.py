"""Logits of a model on a few short sequences, for comparing models."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from moe_jax.stream import LayerSource, forward_hidden


def logits(
    source: LayerSource, tokens: np.ndarray, *, batch: int = 1, dtype=jnp.float32
) -> np.ndarray:  # float32 [B, T, V]
    hidden = forward_hidden(source, tokens, np.ones(tokens.shape, bool), batch=batch, dtype=dtype)
    head = source.head
    return np.stack([np.asarray(head(x)) for x in hidden])


def torch_losses(
    folder: Path, changed: Mapping[str, np.ndarray], windows: np.ndarray, copy: Path
) -> np.ndarray:  # int32 [B, T] -> [B]
    """Nats of each window by transformers on float32 copies of 16-bit weights, some of them changed
    before they are rounded; the model is written to `copy`."""
    stored = load_file(folder / "model.safetensors") | changed
    stored = {name: value.astype(bfloat16).astype(np.float32) for name, value in stored.items()}
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    save_file(stored, copy / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(input_ids=torch.tensor(windows).long()).logits.double()
    found = torch.log_softmax(found[:, :-1], -1)
    wanted = torch.tensor(windows[:, 1:]).long()
    return -found.gather(-1, wanted[..., None])[..., 0].sum(1).numpy()
