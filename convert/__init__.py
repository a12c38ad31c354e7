"""Hugging Face checkpoints to moe_jax and back."""

from typing import TYPE_CHECKING

from moe_jax.facade import lazy_face

if TYPE_CHECKING:
    from convert.checkpoint import (
        Checkpoint,
        layer_tensors,
        load_model,
        open_checkpoint,
    )
    from convert.disk_layer import outer_tensors
    from convert.export import Export
    from convert.export_format import ExportFormat
    from convert.families import FAMILIES, find_family
    from convert.portable import portable_config
    from convert.reader import CheckpointError, SafetensorsFolder
    from convert.rules import Family, expected_tensors
    from convert.save import save_pretrained
    from convert.writer import write_folder

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "CheckpointError",
    "Export",
    "ExportFormat",
    "Family",
    "SafetensorsFolder",
    "expected_tensors",
    "find_family",
    "layer_tensors",
    "load_model",
    "open_checkpoint",
    "outer_tensors",
    "portable_config",
    "save_pretrained",
    "write_folder",
]

_HOMES = {
    "checkpoint": (
        "Checkpoint",
        "layer_tensors",
        "load_model",
        "open_checkpoint",
    ),
    "disk_layer": ("outer_tensors",),
    "export": ("Export",),
    "export_format": ("ExportFormat",),
    "families": ("FAMILIES", "find_family"),
    "reader": ("CheckpointError", "SafetensorsFolder"),
    "rules": ("Family", "expected_tensors"),
    "portable": ("portable_config",),
    "save": ("save_pretrained",),
    "writer": ("write_folder",),
}
__getattr__, __dir__ = lazy_face(__name__, _HOMES)
