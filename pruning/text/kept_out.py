"""Calibration windows that no statistic sees, so that rules can be measured on them."""

from hashlib import sha256
from typing import Any

import numpy as np

from pruning.text.calibration import TokenBatch

FEWEST = 4  # windows of text from which on one is kept out
SHARE, MOST_TOKENS = 1 / 24, 16384  # of the text: nine plans on it cost half of scoring it
MOST_SHARE = 1 / 4  # where every file gives a window


def kept_out_windows(windows: int, length: int) -> int:
    """How many of so many windows of a length in tokens are kept out, if no file asks for more."""
    if windows < FEWEST:
        return 0
    return min(max(1, round(SHARE * windows)), max(1, MOST_TOKENS // length))


def keep_out(batch: TokenBatch) -> tuple[TokenBatch, TokenBatch | None]:
    """Keep some windows out of what is scored: evenly spread, and some of every file.

    Of a file of several windows one is kept out at least, unless that came to more than a quarter
    of the text. Full windows are taken, if there are any; what they say decides nothing.

    Args:
      batch: windows of calibration text.

    Returns:
      (what is left, what is kept out): None for the latter if there are too few windows, or none
      of those kept out has a token to predict.
    """
    count = len(batch.tokens)
    wanted = kept_out_windows(count, batch.tokens.shape[1])
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
    if not parts or sum(shares) > max(wanted, MOST_SHARE * count):
        parts, shares = [np.flatnonzero(usable)], [min(wanted, int(usable.sum()))]
    out = np.zeros(count, bool)
    for rows, share in zip(parts, shares, strict=True):
        out[rows[np.linspace(0, len(rows) - 1, share + 2)[1:-1].astype(int)]] = True
    return batch.of(~out), batch.of(out)


def kept_out_note(batch: TokenBatch) -> dict[str, Any]:
    """What is remembered of windows kept out: how many windows and tokens, and a hash of them."""
    digest = sha256(b"".join(part.tobytes() for part in (batch.tokens, batch.valid, batch.scored)))
    return {"windows": len(batch.tokens), "tokens": batch.total, "sha256": digest.hexdigest()}
