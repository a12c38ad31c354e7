"""A text as overlapping windows in which every token is predicted once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np

from moe_jax.errors import InputError


@dataclass(frozen=True)
class Windows:
    """A text as overlapping windows whose scored positions cover every token but the first once.

    Attributes:
      tokens: int32 [B, T].
      valid: bool [B, T].
      scored: bool [B, T - 1], position t scores the prediction of token t + 1.
      window, stride: tokens.
    """

    tokens: np.ndarray
    valid: np.ndarray
    scored: np.ndarray
    window: int
    stride: int


def make_windows(
    tokens: Sequence[int] | np.ndarray,
    *,
    window: int,
    stride: int | None = None,
    counted: np.ndarray | None = None,
    full: bool = False,
) -> Windows:
    """Cut a token stream into windows.

    Args:
      tokens: the text.
      window: tokens a prediction may see, at most.
      stride: tokens between window starts, below `window`; default half of it, so that every
        prediction but the first window's sees at least half a window.
      counted: bool [T], tokens whose prediction is scored; default all but the first.
      full: let the last window reach back until it is full, as lm-evaluation-harness does. Of a
        text that begins with its tokenizer's one first token, windows of W tokens at stride W - 1
        are then those of its rolling log-likelihood with max_length W - 1.

    Returns:
      The windows.

    Raises:
      InputError: fewer than two tokens, none to score, or a stride outside [1, window).
    """
    stride = max(1, window // 2) if stride is None else stride
    if len(tokens) < 2:
        raise InputError(f"the text has {len(tokens)} tokens; at least 2 are needed to score one")
    if not 1 <= stride < window:
        raise InputError(f"stride={stride} must lie in [1, window={window})")
    rows, masks, scores = [], [], []
    stream, reached, start = np.asarray(tokens, np.int32), 1, 0
    counted = np.ones(len(stream), bool) if counted is None else counted
    if not counted[1:].any():
        raise InputError("the text has no token to score: no answer is in the part that is read")
    while reached < len(stream):
        start = min(start, max(0, len(stream) - window)) if full else start
        end = min(start + window, len(stream))
        row = np.zeros(window, np.int32)
        row[: end - start] = stream[start:end]
        target = start + 1 + np.arange(window - 1)
        rows.append(row)
        masks.append(np.arange(window) < end - start)
        wanted = counted.take(target, mode="clip")
        scores.append((target >= reached) & (target < end) & wanted)
        reached, start = end, start + stride
    return Windows(np.stack(rows), np.stack(masks), np.stack(scores), window, stride)


def text_hashes(texts: Mapping[str, Windows]) -> dict[str, str]:
    """SHA-256 of the tokens of each text, of what is scored of them, and of how they are cut."""
    return {
        name: sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in parts)).hexdigest()
        for name, windows in texts.items()
        for parts in [(np.array(windows.tokens.shape), windows.tokens, windows.scored)]
    }
