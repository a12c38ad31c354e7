"""A calibration text in parts, whose batches go through the layers together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.stream import Batches, LayerSource, in_batches, row_slices

PARTS, PARTS_UNTIL_STABLE = 4, 16
PART_WINDOWS = 64  # at most: the stability of a longer text is told at more places


def rows_of_parts(windows: int, until_stable: bool) -> list[np.ndarray]:
    """Rows of each part, dealt like cards: every part has windows of every file.

    Args:
      windows: B.
      until_stable: whether the statistics may be those of fewer parts, which takes more and
        smaller ones.

    Returns:
      At least four lists of rows, or one per window if there are fewer.
    """
    wanted = PARTS_UNTIL_STABLE if until_stable else PARTS
    count = min(windows, max(wanted, -(-windows // PART_WINDOWS)))
    return [np.arange(start, windows, count) for start in range(count)]


def windows_at_work(parts: Sequence[np.ndarray], batch: int) -> tuple[int, int]:
    """(windows per step, windows in all), those of padding to whole batches included.

    A text of few windows is not padded to whole batches in every part.
    """
    batch = min(batch, max(map(len, parts), default=batch))
    return batch, batch * sum(-(-len(rows) // batch) for rows in parts)


@dataclass(frozen=True, eq=False)
class Parts:
    """A text whose batches each are of one part.

    Attributes:
      batches: of all parts, one part after the other.
      owner: number of the part of each batch.
      tokens: valid tokens of each part.
    """

    batches: Batches
    owner: tuple[int, ...]
    tokens: tuple[int, ...]


def in_parts(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    counted: np.ndarray | None,
    parts: Sequence[np.ndarray],
    batch: int,
) -> Parts:
    """Cut every part of a text into batches.

    Args:
      source: the model that will run it.
      tokens: int32 [B, T].
      valid: bool [B, T].
      counted: bool [B, T], tokens whose prediction counts in a loss; None for all.
      parts: rows of each part.
      batch: rows per step.

    Returns:
      The parts; the last batch of each is filled with rows of padding.
    """
    cut = [
        in_batches(
            source, tokens[rows], valid[rows], batch, None if counted is None else counted[rows]
        )
        for rows in parts
    ]
    owner = tuple(number for number, part in enumerate(cut) for _ in part.rows)
    marks = [part.counted for part in cut if part.counted is not None]
    batches = Batches(
        np.concatenate([part.tokens for part in cut]),
        np.concatenate([part.valid for part in cut]),
        row_slices(batch * len(owner), batch),
        tuple(place for part in cut for place in part.places),
        np.concatenate(marks) if marks else None,
    )
    return Parts(batches, owner, tuple(int(part.valid.sum()) for part in cut))
