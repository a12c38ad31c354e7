"""GPTQ of a whole model, layer by layer, into a folder; and the model that such a folder makes."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from moe_jax.errors import InputError
from moe_jax.quant import QTensor
from moe_jax.quantized import quantize_layer
from moe_jax.stream import LayerSource, contexts, embed, layer_forward, pad_rows
from moe_jax.transformer import DecoderLayer, Embedding, Head
from pruning.shrink.gptq import Coverage, gptq_layer
from pruning.shrink.moments import Batch

HELD_OUT = 8  # one window in so many measures errors and enters no second moment
SUMMARY = "gptq.json"


@dataclass(frozen=True)
class LayerErrors:
    """Error of one quantised layer on held-out tokens that it really receives.

    Attributes:
      nearest, gptq: squared error of the output by rounding to nearest and by GPTQ, relative to
        the square of what the layer adds to its input.
      matrices, fallbacks: see `Coverage`.
    """

    nearest: float
    gptq: float
    matrices: int
    fallbacks: int


def quantize_model(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    folder: Path,
    *,
    group_size: int,
    provenance: dict,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
) -> list[LayerErrors]:
    """Quantise every layer behind the quantised layers before it.

    Args:
      source: the model, pruned if it is to be; at most one of its layers is held.
      tokens: int32 [B, T] calibration windows, B at least 2; one in eight is held out.
      valid: bool [B, T].
      folder: where codes and scales go, a file per layer; replaced if it exists.
      group_size: weights per scale.
      provenance: what the codes depend on, kept in the folder.
      batch: windows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      The errors of every layer.

    Raises:
      InputError: fewer than two windows.
    """
    learn, check = _windows(len(tokens))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seen = batches(source, tokens[learn], valid[learn], batch, dtype)
    held = batches(source, tokens[check], valid[check], batch, dtype)
    errors = []
    for index in range(len(source)):
        layer = source.layer(index)
        quantised, coverage = gptq_layer(layer, seen, group_size)
        errors.append(_errors(layer, quantised, held, coverage, group_size))
        save_file(_stored(quantised), _layer_file(folder, index))
        seen, held = _step(quantised, seen), _step(quantised, held)
        if on_layer:
            on_layer(index)
    summary = {
        "provenance": provenance,
        "group_size": group_size,
        "layers": [dataclasses.asdict(one) for one in errors],
    }
    # Last, so that a folder with a summary is whole.
    (folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return errors


def read_summary(folder: Path) -> dict | None:
    """Provenance, group size and errors of a finished folder; None if there is none."""
    path = folder / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def layer_errors(folder: Path | None) -> list[dict]:
    """`LayerErrors` of every layer as dicts, from a finished folder; none without one."""
    summary = None if folder is None else read_summary(folder)
    return [] if summary is None else summary["layers"]


def _windows(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the windows to learn from and of those held out."""
    if number < 2:
        raise InputError(
            f"GPTQ needs at least 2 calibration windows, one of them held out, but has {number}; "
            "give more text, a shorter --window, or use --quantizer rtn"
        )
    order = np.arange(number)
    check = order[HELD_OUT - 1 :: HELD_OUT] if number >= HELD_OUT else order[-1:]
    return np.setdiff1d(order, check), check


def batches(
    source: LayerSource, tokens: np.ndarray, valid: np.ndarray, batch: int, dtype
) -> list[Batch]:
    """Windows [B, T] as inputs of the first layer, `batch` rows at a time."""
    tokens, valid = pad_rows(tokens, batch), pad_rows(valid, batch)
    places = contexts(source, valid, batch)
    starts = range(0, len(tokens), batch)
    return [
        (embed(source, tokens[start : start + batch], dtype), place)
        for start, place in zip(starts, places, strict=True)
    ]


def _step(layer: DecoderLayer, inputs: Sequence[Batch]) -> list[Batch]:
    return [(np.asarray(layer_forward(layer, jnp.asarray(x), c)), c) for x, c in inputs]


def _errors(
    layer: DecoderLayer,
    quantised: DecoderLayer,
    held: Sequence[Batch],
    coverage: Coverage,
    group_size: int,
) -> LayerErrors:
    rounded, added, nearest, solved = quantize_layer(layer, group_size), 0.0, 0.0, 0.0
    outputs = zip(
        held, _step(layer, held), _step(rounded, held), _step(quantised, held), strict=True
    )
    for (x, context), (exact, _), (near, _), (best, _) in outputs:
        valid = np.asarray(context.valid)
        square = lambda a, b: float(np.square(a - b, dtype=np.float64)[valid].sum())  # noqa: E731, B023
        added += square(exact, x)
        nearest += square(near, exact)
        solved += square(best, exact)
    return LayerErrors(nearest / added, solved / added, **dataclasses.asdict(coverage))


def _layer_file(folder: Path, index: int) -> Path:
    return folder / f"layer-{index:05d}.safetensors"


def _is_coded(leaf) -> bool:
    return isinstance(leaf, QTensor)


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def _stored(layer: DecoderLayer) -> dict[str, np.ndarray]:
    """Codes and scales of a layer by attribute path."""
    arrays = {}
    for keys, leaf in jax.tree.leaves_with_path(layer, is_leaf=_is_coded):
        if _is_coded(leaf):
            arrays[_path(keys) + ".packed"] = np.asarray(leaf.packed)
            arrays[_path(keys) + ".scale"] = np.asarray(leaf.scale)
    return arrays


@dataclass(frozen=True)
class CodedSource:
    """A `LayerSource` whose linear weights are the 4-bit codes in a folder of `quantize_model`."""

    base: LayerSource
    folder: Path
    group_size: int

    @property
    def config(self):
        """The architecture of the base model."""
        return self.base.config

    @property
    def embedding(self) -> Embedding:
        """The base model's embedding."""
        return self.base.embedding

    @property
    def head(self) -> Head:
        """The base model's head."""
        return self.base.head

    def __len__(self) -> int:
        return len(self.base)

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` with the stored codes in place of its linear weights."""
        stored = load_file(_layer_file(self.folder, index))

        def coded(keys, leaf):
            path = _path(keys)
            if path + ".packed" not in stored:
                return leaf
            return QTensor(
                packed=jnp.asarray(stored[path + ".packed"]),
                scale=jnp.asarray(stored[path + ".scale"]),
                group_size=self.group_size,
                axis=0 if path.endswith("experts.w_down") else 1,
            )

        return jax.tree.map_with_path(coded, self.base.layer(index))
