"""Calibration windows that no statistic sees, so that rules can be measured on them."""

from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from pruning.text.calibration import TokenBatch

FEWEST = 4  # windows of text from which on some of it is kept out
SHARE, MOST_TOKENS = 1 / 24, 16384  # of the text: nine plans on it cost half of scoring it
MOST_SHARE = 1 / 4  # where every file gives a part
PART, LEAST = 256, 128  # tokens of a longer window that are kept out; fewest, for many files


def kept_out_size(windows: int, length: int, files: int = 1) -> tuple[int, int]:
    """How many of so many windows of a length in tokens are kept out, and how many tokens of each.

    Of long windows it is the ends of several and not all of a few, since what a rule costs differs
    more from text to text than within one; of every file it is one window at least.
    """
    if windows < FEWEST:
        return 0, 0
    tokens, size = min(SHARE * windows * length, MOST_TOKENS), min(length, PART)
    wanted = min(round(tokens / size), windows)
    rows = max(1, wanted, files)
    if rows == wanted and size == length:
        return rows, size
    return rows, min(length, max(LEAST, int(tokens / rows)))


def keep_out(batch: TokenBatch) -> tuple[TokenBatch, TokenBatch | None]:
    """Keep some windows, or their ends, out of what is scored: evenly spread, some of every file.

    Of a file of several windows one gives something at least, unless that came to more than a
    quarter of the text. Full windows are taken, if there are any; what they say decides nothing.

    Args:
      batch: windows of calibration text.

    Returns:
      (what is left, what is kept out, as windows of their own): None for the latter if there are
      too few windows, or none of those kept out has a token to predict.
    """
    count, length = batch.tokens.shape
    wanted, size = kept_out_size(count, length)
    usable = batch.scored.any(axis=1)
    full = usable & batch.valid.all(axis=1)
    usable = full if full.any() else usable
    if not wanted or not usable.any():
        return batch, None
    files = np.zeros(count, int) if batch.files is None else batch.files
    parts = [
        np.flatnonzero(usable & (files == file))
        for file in np.unique(files[usable]) if (files == file).sum() > 1
    ]  # fmt: skip
    shares = [max(1, round(wanted * len(rows) / count)) for rows in parts]
    _, each = kept_out_size(count, length, sum(shares))
    if parts and (sum(shares) <= wanted or sum(shares) * each <= MOST_SHARE * count * length):
        size = each
    else:
        parts, shares = [np.flatnonzero(usable)], [min(wanted, int(usable.sum()))]
    out = np.zeros(count, bool)
    for rows, share in zip(parts, shares, strict=True):
        share = min(share, len(rows))
        out[rows[((np.arange(share) + 0.5) * len(rows) / share).astype(int)]] = True
    left, ends = _without_ends(batch, out, size)
    return (left, ends) if ends.scored.any() else (batch.of(~out), batch.of(out))


def _without_ends(batch: TokenBatch, rows: np.ndarray, size: int) -> tuple[TokenBatch, TokenBatch]:
    """The windows without the last tokens of some, and these as windows that begin as others do."""
    cut = batch.tokens.shape[1] - size
    first = np.asarray(batch.sources[0].get("first", ()) if batch.sources else (), np.int32)
    if cut <= len(first):
        return batch.of(~rows), batch.of(rows)
    valid = batch.valid.copy()
    valid[rows, cut:] = False
    ends = batch.of(rows)

    def begun(values: np.ndarray, begin) -> np.ndarray:
        head = np.broadcast_to(np.asarray(begin, values.dtype), (len(values), len(first)))
        return np.hstack([head, values[:, cut:]])

    counted = None if ends.counted is None else begun(ends.counted, False)
    parts = {"tokens": begun(ends.tokens, first), "valid": begun(ends.valid, True)}
    return replace(batch, valid=valid), replace(ends, counted=counted, **parts)


def kept_out_note(batch: TokenBatch) -> dict[str, Any]:
    """What is remembered of windows kept out: how many windows and tokens, and a hash of them."""
    digest = sha256(b"".join(part.tobytes() for part in (batch.tokens, batch.valid, batch.scored)))
    return {"windows": len(batch.tokens), "tokens": batch.total, "sha256": digest.hexdigest()}
