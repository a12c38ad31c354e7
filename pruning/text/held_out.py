"""How much of an evaluation text the calibration text has already shown."""

from collections.abc import Mapping

import numpy as np

from pruning.text.calibration import TokenBatch
from pruning.text.windows import Windows

RUN = 13  # tokens; shorter runs are phrases that any two texts share
MUCH = 0.1  # share of runs from which on a loss is not called one on held-out text
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no token is lost in the product


def seen_shares(calibration: TokenBatch, texts: Mapping[str, Windows]) -> dict[str, float | None]:
    """Share of each text's distinct runs of `RUN` tokens that the calibration text holds as well.

    A lower bound: runs across the edges of the calibration windows are not looked at.

    Args:
      calibration: the text that scores come from.
      texts: evaluation texts by name.

    Returns:
      By name: a share in [0, 1], or None if the text has no run so long.

    Source: overlap of training and test data by 13-grams, arXiv:2005.14165, appendix C.
    """
    known = _runs(calibration.tokens, calibration.valid)
    found = {name: _runs(text.tokens, text.valid) for name, text in texts.items()}
    return {
        name: float(np.isin(runs, known, assume_unique=True).mean()) if len(runs) else None
        for name, runs in found.items()
    }


def not_held_out(shares: Mapping[str, float | None]) -> str:
    """A sentence on the texts of which much was seen, "" if there are none."""
    much = [f"{share:.0%} of {name}" for name, share in shares.items() if (share or 0) >= MUCH]
    if not much:
        return ""
    return (
        f"Calibration has shown at least {', '.join(much)} (runs of {RUN} tokens), so the loss "
        "there says little about other text; evaluate on text that is not in --calibration."
    )


def _runs(tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:  # [B, T], [B, T] -> uint64 [R]
    """Distinct hashes of the runs inside the rows."""
    starts = tokens.shape[1] - RUN + 1
    if starts < 1:
        return np.zeros(0, np.uint64)
    hashes = np.zeros((len(tokens), starts), np.uint64)
    whole = np.ones((len(tokens), starts), bool)
    for offset in range(RUN):
        part = slice(offset, offset + starts)
        hashes = hashes * _FACTOR + tokens[:, part].astype(np.uint64) + np.uint64(1)
        whole &= valid[:, part]
    return np.unique(hashes[whole])
