"""The way back: a model of ours, pruned or trained, as a folder that other programs load."""

from pathlib import Path

import numpy as np

from convert.checkpoint import Checkpoint
from convert.export import Export
from convert.export_format import ExportFormat, FormatName, Widths
from moe_jax.experts.moe import MoE
from moe_jax.stream import LayerSource


def save_pretrained(
    model: LayerSource,
    base: Checkpoint,
    folder: Path | str,
    form: FormatName = "ragged-bf16",
    *,
    group_size: int = 32,
    overwrite: bool = False,
) -> Path:
    """Write a model as a Hugging Face folder; it is complete or absent.

    How wide the experts are, and whether emptied ones add constants, is read off the model.
    "padded-bf16" loads everywhere without custom code; it fills narrower experts up with zeros.
    Layers that predict further tokens are left out.

    Args:
      model: a `Transformer`, or anything that hands out its layers one by one.
      base: the checkpoint that it was made from, for names, config and tokenizer.
      folder: where to.
      form: one of the family's formats. Weights are rounded to bfloat16, in a 4-bit format to
        nearest unless they are `QTensor`, which keep their codes.
      group_size: weights per 4-bit scale.
      overwrite: replace an existing folder.

    Returns:
      The folder.

    Raises:
      InputError: the family lacks the format, or the model is another than `base`'s.
      FileExistsError: the folder exists.
      OSError: the disk is too small.
    """
    widths, vectors, cut = shapes_of(model)
    constants = vectors and not base.config.moe.expert_bias  # what vectors are without biases
    written = ExportFormat(form, group_size, constants, cut_router=cut)
    export = Export(base.about, widths, written)
    return export.write(model, folder, overwrite=overwrite)


def shapes_of(model: LayerSource) -> tuple[Widths, bool, bool]:
    """(channels per layer and expert, () for dense layers; whether experts add vectors; whether
    routers know but some experts)."""
    widths, vectors, cut = [], False, False
    for index in range(len(model)):
        mlp = model.layer(index).mlp
        counts = np.asarray(mlp.experts.count) if isinstance(mlp, MoE) else np.zeros(0, int)
        widths.append(tuple(counts.tolist()))
        vectors |= isinstance(mlp, MoE) and mlp.experts.b_down is not None
        cut |= isinstance(mlp, MoE) and mlp.alive is not None
    return tuple(widths), vectors, cut
