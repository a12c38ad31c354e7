"""Writing a pruned model in one of the formats that other programs load."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.checkpoint import Checkpoint, layer_tensors, outer_tensors
from convert.formats import compressed_tensors, padded, ragged
from convert.rules import Codes, Widths, expected_tensors, layer_codes
from convert.writer import Spec, portable_config, write_folder
from moe_jax.stream import LayerSource

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class ExportFormat:
    """A folder layout: padded to one width or ragged, 16 or 4 bits.

    Attributes:
      name: "padded-bf16", "padded-int4", "ragged-bf16" or "ragged-int4".
      group_size: weights per 4-bit scale.
    """

    name: str
    group_size: int = 32

    @property
    def is_ragged(self) -> bool:
        """Whether every expert keeps its own width."""
        return self.name.startswith("ragged")

    @property
    def is_packed(self) -> bool:
        """Whether linear layers are stored in 4 bits."""
        return self.name.endswith("int4")

    def stored_widths(self, widths: Widths) -> Widths:
        """Channels that the folder stores per layer and expert."""
        if self.is_ragged:
            return widths
        widest = self.padded_width(widths)
        return tuple(tuple(widest for _ in counts) for counts in widths)

    def padded_width(self, widths: Widths) -> int:
        """The one width of a padded folder: that of the widest expert, whole groups."""
        widest = max(1, *(count for counts in widths for count in counts))
        return -(-widest // self.group_size) * self.group_size if self.is_packed else widest


def export_specs(base: Checkpoint, widths: Widths, form: ExportFormat) -> dict[str, Spec]:
    """Names, dtypes and shapes of every tensor of an export, before any work.

    Args:
      base: the dense model.
      widths: channels kept per layer and expert, () for dense layers.
      form: the format.

    Returns:
      Name -> (dtype, shape), in file order.
    """
    specs: dict[str, Spec] = {}
    stored = form.stored_widths(widths)
    for name, shape in expected_tensors(base.family, base.config, stored).items():
        if form.is_packed and compressed_tensors.is_quantized_linear(name):
            stem = name.removesuffix("weight")
            packed = compressed_tensors.packed_specs(shape[0], shape[1], form.group_size)
            specs |= {stem + suffix: packed[suffix] for suffix in SUFFIXES}
        else:
            specs[name] = BFLOAT16, shape
    return specs


def export_bytes(base: Checkpoint, widths: Widths, form: ExportFormat) -> int:
    """Bytes of the tensors that an export will hold, known from shapes alone."""
    return sum(
        int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        for dtype, shape in export_specs(base, widths, form).values()
    )


def export_config(base: Checkpoint, widths: Widths, form: ExportFormat) -> dict[str, Any]:
    """config.json of an export: the source's, edited, in both spellings of transformers."""
    config = portable_config(base.hf_config)
    config["dtype"] = config["torch_dtype"] = "bfloat16"
    if form.is_ragged:
        config = ragged.ragged_config(config, [list(counts) for counts in widths])
    else:
        config = padded.padded_config(config, form.padded_width(widths))
    if form.is_packed:
        dense = [
            name.removesuffix(".weight")
            for name, (_, shape) in export_specs(base, widths, form).items()
            if name.endswith(".weight") and len(shape) == 2 and "embed_tokens" not in name
        ]
        if base.config.tie_embeddings:
            dense.append("lm_head")
        config["quantization_config"] = compressed_tensors.quantization_config(
            dense, form.group_size
        )
    return config


def check_widths(base: Checkpoint, widths: Widths, form: ExportFormat) -> None:
    """Raise ValueError unless every group of 4-bit weights of an export is whole."""
    if form.is_packed:
        stored = expected_tensors(base.family, base.config, form.stored_widths(widths))
        linears = filter(compressed_tensors.is_quantized_linear, stored)
        columns = {stored[name][1] for name in linears}
        compressed_tensors.check_group_size(form.group_size, columns)


def export_checkpoint(
    source: LayerSource,
    base: Checkpoint,
    widths: Widths,
    target: Path | str,
    form: ExportFormat,
    *,
    overwrite: bool = False,
    on_layer: Callable[[int], None] | None = None,
) -> Path:
    """Write a model, one layer in memory at a time; the folder is complete or absent.

    Args:
      source: the pruned model in the order of `base`'s layers; weights that are `QTensor` keep
        their codes and scales in a 4-bit format.
      base: the dense checkpoint, for names, config and tokenizer files.
      widths: channels per layer and expert of `source`, () for dense layers.
      target: folder to make.
      form: the format.
      overwrite: replace an existing folder.
      on_layer: called with the index of each finished layer.

    Returns:
      The folder.

    Raises:
      ValueError: if widths do not fit the group size, or the target exists.
      OSError: if the disk is too small.
    """
    check_widths(base, widths, form)
    modelling = ragged.MODELLING_FILE
    return write_folder(
        target,
        export_specs(base, widths, form),
        _tensors(source, base, widths, form, on_layer),
        export_config(base, widths, form),
        base.folder,
        extra_files={modelling.name: modelling} if form.is_ragged else {},
        overwrite=overwrite,
    )


def _tensors(source, base: Checkpoint, widths: Widths, form: ExportFormat, on_layer):
    yield from ((name, value.astype(BFLOAT16)) for name, value in outer_tensors(source))
    stored = expected_tensors(base.family, base.config, form.stored_widths(widths))
    for index in range(len(source)):
        prefix = f"model.layers.{index}."
        layer = source.layer(index)
        codes = dict(layer_codes(base.family.rules, layer, index)) if form.is_packed else {}
        here = {n: v for n, v in layer_tensors(base, layer, index) if n not in codes}
        for name, shape in stored.items():
            if name in codes:
                yield from _as_coded(name, codes[name], shape, form)
            elif name.startswith(prefix):
                yield from _stored(name, here.get(name), shape, form)
        if on_layer:
            on_layer(index)


def _stored(
    name: str, value: np.ndarray | None, shape: tuple[int, ...], form: ExportFormat
) -> Iterator[tuple[str, np.ndarray]]:
    """One tensor as it goes to disk; an emptied expert of a padded folder is all zeros."""
    full = np.zeros(shape, BFLOAT16)
    if value is not None:
        full[tuple(slice(size) for size in value.shape)] = value.astype(BFLOAT16)
    if form.is_packed and compressed_tensors.is_quantized_linear(name):
        parts = compressed_tensors.quantize_linear(full, form.group_size)
        yield from ((name.removesuffix("weight") + key, part) for key, part in parts.items())
    else:
        yield name, full


def _as_coded(
    name: str, weight: Codes, shape: tuple[int, ...], form: ExportFormat
) -> Iterator[tuple[str, np.ndarray]]:
    """A weight that is already in 4 bits, bit for bit; padding is code 0 at the least scale."""
    group_size = weight.codes.shape[1] // weight.scale.shape[1]
    if group_size != form.group_size:
        raise ValueError(
            f"{name} has one scale per {group_size} weights; export it with that group size "
            f"instead of {form.group_size}"
        )
    codes = np.zeros(shape, np.int8)
    scale = np.full((shape[0], shape[1] // group_size), compressed_tensors.MIN_SCALE)
    for full, part in ((codes, weight.codes), (scale, weight.scale)):
        full[tuple(slice(size) for size in part.shape)] = part
    parts = compressed_tensors.pack_codes(codes, scale)
    yield from ((name.removesuffix("weight") + key, part) for key, part in parts.items())
