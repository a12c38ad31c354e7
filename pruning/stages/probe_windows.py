"""The windows of tokens on which the logits of an export are compared, and where in them."""

import logging
from collections.abc import Sequence

import numpy as np

from convert.checkpoint import Checkpoint
from moe_jax.config import ModelConfig
from pruning.text.calibration import TokenBatch

logger = logging.getLogger(__name__)

# Many and short: a near tie ends what can be compared of its window.
PROBE_WINDOWS, PROBE_TOKENS = 8, 32
# Long ones show what short ones cannot; gpt-oss and DeepSeek were first trained on 4,096 tokens.
FAR_WINDOWS, LONGEST_PROBE = 2, 4096 + PROBE_TOKENS

Probe = tuple[np.ndarray, ...]  # of short windows, and of long ones for models that need them


def far_lengths(config: ModelConfig) -> tuple[int, int]:
    """Tokens of a window to compare logits on, and how many would show all that a model does.

    Those are more than a sliding window or the original context of a stretched rope, by
    `PROBE_TOKENS`, but never more than the model's context: past them logits can differ that were
    equal before.
    """
    rope = config.attention.rope
    turning = rope.original_max_position if rope.kind not in ("default", "linear") else None
    beyond = max(config.sliding_window or 0, turning or 0)
    needed = min(beyond + PROBE_TOKENS, config.max_position)
    return min(needed, LONGEST_PROBE), needed


def probe_shapes(config: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Windows and their tokens, of a probe; of its short ones there may be fewer."""
    short = PROBE_WINDOWS, min(PROBE_TOKENS, config.max_position)
    length, _ = far_lengths(config)
    return (short, (FAR_WINDOWS, length)) if length > PROBE_TOKENS else (short,)


def compared(shapes: Sequence[tuple[int, int]]) -> int:
    """At how many positions of windows of these shapes logits are compared."""
    return sum(windows * min(length, PROBE_TOKENS) for windows, length in shapes)


def text_probe(base: Checkpoint, text: TokenBatch) -> Probe:
    """Windows of calibration text, each int32 [B, T], for comparing logits.

    Long ones take what is valid of the text as one document. Windows that it is too short for are
    of random tokens.
    """
    short, *far = random_probe(base)
    if text.total:
        length = min(PROBE_TOKENS, int(text.valid.sum(axis=1).max()))
        whole = np.flatnonzero(text.valid[:, :length].all(axis=1))
        rows = np.unique(whole[np.linspace(0, len(whole) - 1, PROBE_WINDOWS).astype(int)])
        short = text.tokens[rows, :length]
    if far and text.total >= far[0].shape[1]:
        tokens, (windows, length) = text.tokens[text.valid], far[0].shape
        starts = np.linspace(0, len(tokens) - length, windows).astype(int)
        far = [tokens[starts[:, None] + np.arange(length)]]
    return short, *far


def random_probe(base: Checkpoint) -> Probe:
    """Windows of random tokens, each int32 [B, T], for comparing logits without a text."""
    length, needed = far_lengths(base.config)
    if length < needed:
        logger.warning(
            "logits are compared on %d tokens, what the model does with more than %d is not",
            length,
            needed - PROBE_TOKENS,
        )
    # What stands for an image is no text, and programs compute another thing from it.
    outer = base.about.outer or {}
    others = [value for key, value in outer.items() if key.endswith("_token_id")]
    others = [one for one in others if isinstance(one, int)]
    rng, size = np.random.default_rng(0), base.config.vocab_size
    drawn = [rng.integers(0, size, shape) for shape in probe_shapes(base.config)]
    return tuple(np.where(np.isin(some, others), 0, some).astype(np.int32) for some in drawn)
