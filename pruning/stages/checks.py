"""What a check of an export found, and when logits of two programs are the same."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pruning.kit.errors import VerificationError

TOLERANCE = 2e-3  # of float32 logits of two programs, as a share of the largest (at least 1)
# Positions to judge by; and without so many, the share of all at which differences may begin.
LEAST, SHARE = 8, 0.01
MOST = 0.75  # of all positions that must not differ, near ties or not


@dataclass(frozen=True)
class Check:
    """One verified fact about an export, or one that could not be verified.

    Attributes:
      export: format of the folder.
      check: what was compared.
      ok: False if something is wrong.
      detail: what was compared and how it came out, or why nothing was.
      done: False if nothing was compared; then `ok` says no more than that nothing is known.
    """

    export: str
    check: str
    ok: bool
    detail: str
    done: bool = True


def require_verified(checks: Sequence[Check]) -> None:
    """Raise VerificationError naming every check that failed."""
    failed = [f"{c.export}: {c.check}: {c.detail}" for c in checks if not c.ok]
    if failed:
        raise VerificationError(
            f"{'; '.join(failed)}. Do not use the folder: export it again with --overwrite, and if "
            "that changes nothing, tell us the lines above"
        )


def logit_check(
    export: str, name: str, found: np.ndarray, wanted: np.ndarray, settled: np.ndarray
) -> Check:
    """Compare logits [B, P, V] of a program with those wanted, where they must be the same.

    Args:
      export, name: of the check.
      found, wanted: float32 [B, P, V].
      settled: bool [B, P], where rounding cannot have sent a token to another expert. If found and
        wanted differ anywhere, these positions are judged. Are they fewer than `LEAST` or first
        ones alone, which see no other position, all are: differences may begin at a hundredth of
        them, where a near tie fell the other way, and go on behind them, but not at most.
    """
    difference, limit = _difference(found, wanted)
    within = difference <= limit  # False for NaN
    enough = settled.sum() >= LEAST and settled[:, 1:].any()
    judged = settled if enough and not within.all() else np.ones_like(settled)
    begun = (~within).any(axis=1).sum()  # sequences in which a difference begins
    ok = within[judged].all() if enough else begun <= SHARE * within.size and _mostly(within)
    detail = f"max difference {difference[judged].max():.2g} (limit {limit:.2g})"
    if not judged.all():
        detail += f" at {judged.sum()} of {judged.size} positions; others follow a near tie"
    elif not within.all():
        detail += f"; {within.size - within.sum()} of {within.size} positions differ by more"
    return Check(export, name, bool(np.isfinite(found).all() and ok), detail)


def long_check(export: str, name: str, found: np.ndarray, wanted: np.ndarray) -> Check:
    """Compare logits at the ends of long windows, where sliding windows of attention show.

    Hardly one has no near tie before it. What that changes of one token is little among so many,
    but a mask that is wrong is wrong at all positions: most must be the same.

    Args:
      export, name: of the check.
      found, wanted: float32 [B, P, V].
    """
    difference, limit = _difference(found, wanted)
    within = difference <= limit
    detail = f"{within.sum()} of {within.size} positions differ by no more than {limit:.2g}"
    return Check(export, name, _mostly(within), detail)


def _mostly(within: np.ndarray) -> bool:
    return bool(within.mean() >= MOST)


def _difference(found: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, float]:
    """Largest difference of each position, [B, P], and the largest that rounding explains."""
    limit = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
    return np.abs(found - wanted).max(axis=-1), limit
