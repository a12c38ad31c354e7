"""GPTQ of a whole model, layer by layer, into a folder; and the model that such a folder makes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.quantized import quantize_layer
from moe_jax.source import groups_of
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import Batches, LayerSource, in_batches, layer_forward, mapped, sweep
from moe_jax.transformer import DecoderLayer
from pruning.kit.memory import allowance
from pruning.scores.parts import dealt
from pruning.shrink.gptq import MOMENT_BYTES, gptq_layer
from pruning.shrink.gptq_codes import stored_codes, with_stored_codes
from pruning.shrink.gptq_errors import LayerErrors, errors_of
from pruning.shrink.gptq_groups import InGroups
from pruning.shrink.progress import LayerArrays, LayerFolder, States, held_out

SUMMARY = "gptq.json"


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
    scratch: Path | None = None,
) -> list[LayerErrors]:
    """Quantise every layer behind the quantised layers before it.

    Processes share the windows and add their second moments up; then all solve alike, and process
    0 writes.

    Args:
      source: the model, pruned if it is to be; at most one of its layers is held, or one of its
        groups, see `pruning.shrink.gptq_groups`.
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
      scratch: folder of what does not fit in memory beside a layer in groups; default the system's.

    Returns:
      The errors of every layer.

    Raises:
      InputError: fewer than two windows, or processes that take layers in other groups.
      FullDiskError: the disk is full; what was finished stays.
    """
    learn, check = _windows(len(tokens))
    _require_alike(source, spread)
    codes = codes_in(folder, spread)
    seen, held = (
        dealt(in_batches(source, tokens[part], valid[part], batch), spread)[0]
        for part in (learn, check)
    )
    found = codes.open(provenance)
    layers, x = found or ([], (seen.embedded(source, dtype), held.embedded(source, dtype)))

    moment_bytes = min(spread.told(allowance().of(MOMENT_BYTES)))  # of as many experts in all
    work = InGroups(source, (seen, held), group_size, moment_bytes, spread, scratch)

    def keep(index: int, arrays: LayerArrays, errors: LayerErrors, x: States) -> States:
        layers.append(dataclasses.asdict(errors))
        codes.add(index, arrays, provenance, layers, x)
        return x

    def step(index: int, layer: DecoderLayer, x: States) -> States:
        inputs = list(zip(x[0], seen.places, strict=True))
        quantised, solved = gptq_layer(layer, inputs, group_size, moment_bytes, spread)
        forms = layer, quantize_layer(layer, group_size), quantised
        outputs = [_forward(form, held, list(x[1])) for form in forms]
        errors = errors_of(held, x[1], outputs, solved, spread)
        x = _forward(quantised, seen, x[0]), _forward(quantised, held, x[1])
        return keep(index, stored_codes(quantised), errors, x)

    def in_groups(index: int, x: States) -> States:
        with work.layer(index, x) as (arrays, errors):
            return keep(index, arrays, errors, x)

    sweep(
        source, x, step, layers=range(len(layers), len(source)), on_layer=on_layer,
        in_groups=in_groups,
    )  # fmt: skip
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


def _require_alike(source: LayerSource, spread: Spread) -> None:
    """Raise InputError if processes take layers in other groups than each other: they add up
    moments of as many experts at a time."""
    told = spread.told([groups_of(source, index) for index in range(len(source))])
    if any(one != told[0] for one in told):
        raise InputError(
            "processes have room for groups of different sizes of a layer's experts; give all of "
            "them a --memory-limit that each has free"
        )


def _forward(layer: DecoderLayer, text: Batches, x: list[np.ndarray]) -> list[np.ndarray]:
    return text.each(x, lambda x, place, rows: layer_forward(layer, x, place))


def with_codes(source: LayerSource, folder: Path, group_size: int) -> LayerSource:
    """A model whose linear weights are the 4-bit codes in a folder of `quantize_model`.

    Args:
      source: the model that the codes were chosen for.
      folder: of the codes.
      group_size: weights per scale.

    Returns:
      The source; the codes of each layer, or of a group of it, are read with it.
    """

    files = codes_in(folder)

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        return with_stored_codes(index, layer, files, group_size)

    return mapped(source, change, by_group=True)
