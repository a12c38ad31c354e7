"""What quantising a layer did to its output."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.spread import Spread
from moe_jax.stream import Batches
from pruning.shrink.gptq import Solved


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


Parts = Iterable[np.ndarray]  # per batch [b, T, D]


def errors_of(
    held: Batches, x: Parts, outputs: Sequence[Parts], solved: Solved, spread: Spread
) -> LayerErrors:
    """Errors of a layer on the windows of all processes.

    Args:
      held: the windows of this process.
      x: the layer's input.
      outputs: its output as it is, rounded to nearest, and quantised.
      solved: what was done.
      spread: the processes.
    """
    added = nearest = gptq = 0.0
    for rows, a, b, c, d in zip(held.rows, x, *outputs, strict=True):
        valid = held.valid[rows]

        def square(one: np.ndarray, other: np.ndarray, valid=valid) -> float:
            return float(np.square(one - other, dtype=np.float64)[valid].sum())

        added, nearest, gptq = added + square(b, a), nearest + square(c, b), gptq + square(d, b)
    own = {"added": added, "nearest": nearest, "gptq": gptq}
    found = spread.total({name: np.array(value) for name, value in own.items()})
    size = float(found["added"])
    return LayerErrors(
        nearest=float(found["nearest"]) / size,
        gptq=float(found["gptq"]) / size,
        **dataclasses.asdict(solved),
    )
