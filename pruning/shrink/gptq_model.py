"""GPTQ of a whole model, layer by layer, into a folder."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.files import remove_leftovers, replace_file, replace_text
from moe_jax.json_files import parse_json
from moe_jax.quantized import quantize_layer
from moe_jax.stream import Batches, LayerSource, in_batches, layer_forward, sweep
from moe_jax.transformer import DecoderLayer
from pruning.shrink.gptq import Solved, gptq_layer
from pruning.shrink.gptq_codes import SUMMARY, LayerErrors, Summary, digest, layer_file, stored

HELD_OUT = 8  # one window in so many measures errors and enters no second moment
STATES = "states"  # behind the last finished layer; gone when all are
Texts = tuple[list[np.ndarray], list[np.ndarray]]  # what is learnt from and what is held out


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
      folder: where codes and scales go, a file per layer, and last a summary, without which it is
        not whole. Codes of another provenance that lie there go first: the disk need not hold both.
        If an earlier call was killed there, this one goes on after its last layer.
      group_size: weights per scale.
      provenance: all that the codes depend on, JSON-compatible; kept in the folder.
      batch: windows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      The errors of every layer.

    Raises:
      InputError: fewer than two windows.
      FullDiskError: the disk is full; what was finished stays.
    """
    learn, check = _windows(len(tokens))
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    seen = in_batches(source, tokens[learn], valid[learn], batch)
    held = in_batches(source, tokens[check], valid[check], batch)
    found = _read_progress(folder / STATES, provenance)
    if found is None:
        _remove_codes(folder)
        found = [], [], (seen.embedded(source, dtype), held.embedded(source, dtype))
    errors, codes, x = found

    def summary() -> Summary:
        layers = [dataclasses.asdict(one) for one in errors]
        return Summary(provenance=provenance, group_size=group_size, codes=codes, layers=layers)

    def step(index: int, layer: DecoderLayer, x: Texts) -> Texts:
        inputs = list(zip(x[0], seen.places, strict=True))
        quantised, solved = gptq_layer(layer, inputs, group_size)
        errors.append(_errors(layer, quantised, held, x[1], solved, group_size))
        arrays = stored(quantised)
        replace_file(layer_file(folder, index), lambda partial: save_file(arrays, partial))
        codes.append(digest(layer_file(folder, index)))
        x = _forward(quantised, seen, x[0]), _forward(quantised, held, x[1])
        _write_progress(folder / STATES, summary(), x)
        return x

    sweep(source, x, step, layers=range(len(errors), len(source)), on_layer=on_layer)
    replace_text(folder / SUMMARY, json.dumps(summary(), indent=2) + "\n")
    (folder / STATES).unlink(missing_ok=True)
    return errors


def _remove_codes(folder: Path) -> None:
    for name in (SUMMARY, STATES):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("layer-[0-9]*.safetensors"):
        path.unlink()


def _write_progress(path: Path, summary: Summary, x: Texts) -> None:
    """Keep the states behind the last finished layer, and what is known so far."""
    facts = {"parts": [len(states) for states in x], "dtype": x[0][0].dtype.name, **summary}

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            file.write(json.dumps(facts).encode() + b"\n")
            for states in (*x[0], *x[1]):  # as bytes: numpy's files do not know bfloat16
                np.save(file, states.view(np.uint8), allow_pickle=False)

    replace_file(path, write)


def _read_progress(
    path: Path, provenance: dict
) -> tuple[list[LayerErrors], list[str], Texts] | None:
    """What `_write_progress` kept; None if there is nothing, or of other codes."""
    try:
        with open(path, "rb") as file:
            facts = parse_json(file.readline())
            if facts["provenance"] != provenance:
                return None
            dtype = jnp.dtype(facts["dtype"])
            seen, held = (
                [np.load(file, allow_pickle=False).view(dtype) for _ in range(count)]
                for count in facts["parts"]
            )
        errors = [LayerErrors(**one) for one in facts["layers"]]
        return errors, facts["codes"], (seen, held)
    except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError):  # none, or damaged
        return None


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


def _forward(layer: DecoderLayer, text: Batches, x: list[np.ndarray]) -> list[np.ndarray]:
    return text.each(x, lambda x, place, rows: layer_forward(layer, x, place))


def _errors(
    layer: DecoderLayer,
    quantised: DecoderLayer,
    held: Batches,
    x: list[np.ndarray],
    solved: Solved,
    group_size: int,
) -> LayerErrors:
    """Errors of a layer whose input is `x`, left as it is."""
    rounded = quantize_layer(layer, group_size)
    exact, near, best = (_forward(each, held, list(x)) for each in (layer, rounded, quantised))

    def square(a: list[np.ndarray], b: list[np.ndarray]) -> float:
        parts = zip(a, b, held.rows, strict=True)
        return sum(
            float(np.square(one - other, dtype=np.float64)[held.valid[rows]].sum())
            for one, other, rows in parts
        )

    added = square(exact, x)
    return LayerErrors(
        nearest=square(near, exact) / added,
        gptq=square(best, exact) / added,
        **dataclasses.asdict(solved),
    )
