"""Hugging Face checkpoints to moe_jax and back."""

from convert.checkpoint import (
    Checkpoint,
    layer_tensors,
    load_model,
    open_checkpoint,
    outer_tensors,
)
from convert.families import FAMILIES, find_family
from convert.reader import CheckpointError, SafetensorsFolder
from convert.rules import Family, expected_tensors
from convert.writer import portable_config, write_folder

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "CheckpointError",
    "Family",
    "SafetensorsFolder",
    "expected_tensors",
    "find_family",
    "layer_tensors",
    "load_model",
    "open_checkpoint",
    "outer_tensors",
    "portable_config",
    "write_folder",
]
