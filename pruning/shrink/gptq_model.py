"""GPTQ of a whole model, layer by layer, into a folder; and the model that such a folder makes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.quant import QTensor
from moe_jax.quantized import quantize_layer
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import Batches, LayerSource, in_batches, layer_forward, mapped, sweep
from moe_jax.transformer import DecoderLayer
from pruning.scores.parts import dealt
from pruning.shrink.gptq import Solved, gptq_layer
from pruning.shrink.progress import LayerFolder, States, held_out

SUMMARY = "gptq.json"


@dataclass(frozen=True)
class LayerErrors:
    """Error of one quantised layer on held-out tokens that it really receives.

    Attributes:
      nearest, gptq: squared error of the output by rounding to nearest and by GPTQ, relative to
        the square of what the layer adds to its input.
      matrices, fallbacks: see `Solved`.
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
    spread: Spread = ALONE,
) -> list[LayerErrors]:
    """Quantise every layer behind the quantised layers before it.

    Processes share the windows and add their second moments up; then all solve alike, and process
    0 writes.

    Args:
      source: the model, pruned if it is to be; at most one of its layers is held.
      tokens: int32 [B, T] calibration windows, B at least 2; one in eight is held out.
      valid: bool [B, T].
      folder: where codes and scales go, a file per layer, and last a summary, without which it is
        not whole. Codes of another provenance that lie there go first: the disk need not hold both.
        If an earlier call was killed there, this one goes on after its last layer.
      group_size: weights per scale.
      provenance: all that the codes depend on, JSON-compatible; kept in the folder.
      batch: windows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.
      spread: the processes.

    Returns:
      The errors of every layer.

    Raises:
      InputError: fewer than two windows.
      FullDiskError: the disk is full; what was finished stays.
    """
    learn, check = _windows(len(tokens))
    codes = codes_in(folder, spread)
    seen, held = (
        dealt(in_batches(source, tokens[part], valid[part], batch), spread)[0]
        for part in (learn, check)
    )
    found = codes.open(provenance)
    layers, x = found or ([], (seen.embedded(source, dtype), held.embedded(source, dtype)))

    def step(index: int, layer: DecoderLayer, x: States) -> States:
        inputs = list(zip(x[0], seen.places, strict=True))
        quantised, solved = gptq_layer(layer, inputs, group_size, spread=spread)
        errors = _errors(layer, quantised, held, x[1], solved, group_size, spread)
        layers.append(dataclasses.asdict(errors))
        x = _forward(quantised, seen, x[0]), _forward(quantised, held, x[1])
        codes.add(index, _stored(quantised), provenance, layers, x)
        return x

    sweep(source, x, step, layers=range(len(layers), len(source)), on_layer=on_layer)
    codes.close(provenance, layers)
    return [LayerErrors(**one) for one in layers]


def codes_in(folder: Path, spread: Spread = ALONE) -> LayerFolder:
    """A folder of `quantize_model`."""
    return LayerFolder(folder, SUMMARY, "the 4-bit codes that GPTQ chose", LayerErrors, spread)


def progress_bytes(config: ModelConfig, shape: tuple[int, int], batch: int, dtype) -> int:
    """Most bytes of the states that a run keeps beside its codes, old and new ones at once.

    Args:
      config: of the model.
      shape: (B, T) of the text.
      batch: windows per step.
      dtype: of the activations.
    """
    windows = shape[0] + 2 * (batch - 1)  # padding of what is learnt from and what is held out
    return 2 * windows * shape[1] * config.d_model * jnp.dtype(dtype).itemsize


def layer_errors(folder: Path | None) -> list[dict]:
    """`LayerErrors` of every layer as dicts, from a finished folder; none without one."""
    summary = None if folder is None else codes_in(folder).read_summary()
    return [] if summary is None else summary["layers"]


def _windows(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the windows to learn from and of those held out."""
    if number < 2:
        raise InputError(
            f"GPTQ needs at least 2 calibration windows, one of them held out, but has {number}; "
            "give more text, a shorter --window, or use --quantizer rtn"
        )
    return held_out(number)


def _forward(layer: DecoderLayer, text: Batches, x: list[np.ndarray]) -> list[np.ndarray]:
    return text.each(x, lambda x, place, rows: layer_forward(layer, x, place))


def _errors(
    layer: DecoderLayer,
    quantised: DecoderLayer,
    held: Batches,
    x: list[np.ndarray],
    solved: Solved,
    group_size: int,
    spread: Spread,
) -> LayerErrors:
    """Errors of a layer whose input is `x`, left as it is, on the windows of all processes."""
    rounded = quantize_layer(layer, group_size)
    exact, near, best = (_forward(each, held, list(x)) for each in (layer, rounded, quantised))

    def square(a: list[np.ndarray], b: list[np.ndarray]) -> np.ndarray:
        parts = zip(a, b, held.rows, strict=True)
        found = sum(
            float(np.square(one - other, dtype=np.float64)[held.valid[rows]].sum())
            for one, other, rows in parts
        )
        return np.array(found)

    own = {"added": square(exact, x), "nearest": square(near, exact), "gptq": square(best, exact)}
    found = {name: float(value) for name, value in spread.total(own).items()}
    return LayerErrors(
        nearest=found["nearest"] / found["added"],
        gptq=found["gptq"] / found["added"],
        **dataclasses.asdict(solved),
    )


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


def with_codes(source: LayerSource, folder: Path, group_size: int) -> LayerSource:
    """A model whose linear weights are the 4-bit codes in a folder of `quantize_model`.

    Args:
      source: the model that the codes were chosen for.
      folder: of the codes.
      group_size: weights per scale.

    Returns:
      The source; each layer's codes are read with it.
    """

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        stored = codes_in(folder).arrays(index)

        def code(keys, leaf):
            path = _path(keys)
            if path + ".packed" not in stored:
                return leaf
            return QTensor(
                packed=jnp.asarray(stored[path + ".packed"]),
                scale=jnp.asarray(stored[path + ".scale"]),
                group_size=group_size,
                axis=0 if path.endswith("experts.w_down") else 1,
            )

        return jax.tree.map_with_path(code, layer)

    return mapped(source, change)
