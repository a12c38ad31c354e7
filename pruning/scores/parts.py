"""A calibration text in parts, whose batches go through the layers together."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from moe_jax.spread import ALONE, Spread
from moe_jax.stream import Batches, LayerSource, even_batch, in_batches, pad_rows, row_slices
from pruning.scores.grams import SHARE, sample_lengths

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

    All parts share one shape, that which pads the longest of them least.
    """
    batch = even_batch(max(map(len, parts), default=batch), batch)
    return batch, batch * sum(-(-len(rows) // batch) for rows in parts)


@dataclass(frozen=True, eq=False)
class Parts:
    """A text whose batches each are of one part, as far as this process works on it.

    Attributes:
      batches: of all parts, one part after the other; on several devices of a process, the batches
        that are at work at once are one.
      owner: number of the part of each batch of a single device.
      tokens: valid tokens of each part, in all processes.
      sampled: int32 [B], how many tokens from the beginning of each window of `batches` are of a
        sample of the text, see `sample_lengths`.
    """

    batches: Batches
    owner: tuple[int, ...]
    tokens: tuple[int, ...]
    sampled: np.ndarray


def in_parts(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    counted: np.ndarray | None,
    parts: Sequence[np.ndarray],
    batch: int,
    spread: Spread = ALONE,
) -> Parts:
    """Cut every part of a text into batches, and deal them to processes and devices.

    Args:
      source: the model that will run it.
      tokens: int32 [B, T].
      valid: bool [B, T].
      counted: bool [B, T], tokens whose prediction counts in a loss; None for all.
      parts: rows of each part.
      batch: rows per step of a device.
      spread: where this process is, and its devices.

    Returns:
      The parts; the last batch of each is filled with rows of padding, the last step of a process
      with such batches.
    """

    def padded(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return pad_rows(values[rows], batch)

    cut = [
        in_batches(
            source, padded(tokens, rows), padded(valid, rows), batch,
            None if counted is None else padded(counted, rows),
        )
        for rows in parts
    ]  # fmt: skip
    owner = tuple(number for number, part in enumerate(cut) for _ in part.rows)
    marks = [part.counted for part in cut if part.counted is not None]
    lengths = sample_lengths(len(tokens), tokens.shape[1], SHARE)
    batches = Batches(
        np.concatenate([part.tokens for part in cut]),
        np.concatenate([part.valid for part in cut]),
        row_slices(batch * len(owner), batch),
        tuple(place for part in cut for place in part.places),
        np.concatenate(marks) if marks else None,
    )
    whole = Parts(
        batches, owner, tuple(int(part.valid.sum()) for part in cut),
        np.concatenate([padded(lengths, rows) for rows in parts]),
    )  # fmt: skip
    return whole if spread.processes * spread.devices == 1 else _dealt(whole, spread)


def _dealt_batches(batches: int, spread: Spread) -> int:
    """Batches of every process: whole steps of its devices, one at least."""
    step = spread.processes * spread.devices
    return spread.devices * max(1, -(-batches // step))


def _dealt(whole: Parts, spread: Spread) -> Parts:
    own = range(len(whole.owner))[spread.process :: spread.processes]
    owner = tuple(whole.owner[number] for number in own)
    batches, taken = dealt(whole.batches, spread)
    sampled = pad_rows(whole.sampled, len(whole.sampled) + 1)[taken]
    return Parts(batches, owner, whole.tokens, sampled)


def dealt(text: Batches, spread: Spread) -> tuple[Batches, np.ndarray]:
    """What of a text is one process's, a step of all its devices after the other.

    Args:
      text: as it is for one device.
      spread: where this process is, and its devices.

    Returns:
      Its batches, one at least, and which window of the text each of its own is; the others are
      padding, which is one beyond the last.
    """
    windows, batch = len(text.tokens), text.rows[0].stop
    if spread.processes * spread.devices == 1:
        return text, np.arange(windows)
    own = range(len(text.rows))[spread.process :: spread.processes]
    take = np.full((_dealt_batches(len(text.rows), spread), batch), windows)
    take[: len(own)] = np.arange(windows).reshape(-1, batch)[own]
    steps = row_slices(take.size, spread.devices * batch)

    def taken(leaf: np.ndarray) -> np.ndarray:
        return pad_rows(leaf, windows + 1)[take.ravel()]

    place = jax.tree.map(lambda *leaves: taken(np.concatenate(leaves)), *text.places)
    batches = Batches(
        taken(text.tokens),
        taken(text.valid),
        steps,
        tuple(spread.dealt(jax.tree.map(lambda leaf, s=step: leaf[s], place)) for step in steps),
        None if text.counted is None else taken(text.counted),
    )
    return batches, take.ravel()
