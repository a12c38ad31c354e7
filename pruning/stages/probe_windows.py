"""The windows of tokens on which the logits of an export are compared, and where in them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from convert.checkpoint import Checkpoint
from moe_jax.config import ModelConfig
from pruning.text.calibration import TokenBatch

# Many and short: a near tie ends what can be compared of its window.
PROBE_WINDOWS, PROBE_TOKENS = 8, 32
LONG_WINDOWS = 2
# Further out the same angle in float32 is another one in two programs: their logits were 0.002
# apart at 32,768 positions and 0.1 at 262,144, where rounding otherwise explains 0.01.
FARTHEST = 1 << 15


class WindowShape(NamedTuple):
    """How many windows of how many tokens, and the positions from a token to the next."""

    windows: int
    length: int
    stride: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class ProbeWindows:
    """Windows of one length.

    Attributes:
      tokens: int32 [B, T]; logits are compared at the last `PROBE_TOKENS`.
      stride: positions from a token to the next, as rotary embeddings have it.
    """

    tokens: np.ndarray
    stride: int = 1

    @property
    def is_long(self) -> bool:
        """Whether they have tokens beyond those that logits are compared at."""
        return self.tokens.shape[1] > PROBE_TOKENS

    @property
    def shape(self) -> WindowShape:
        """Their shape."""
        return WindowShape(len(self.tokens), self.tokens.shape[1], self.stride)


Probe = tuple[ProbeWindows, ...]  # short ones, and what else shows all that a model does


def rope_stride(config: ModelConfig) -> int:
    """Positions between the tokens of a short window that reaches past the context that a rope was
    stretched from or to `FARTHEST`, and never past the model's own; 1 if it was not stretched.

    What rotations do there needs no text so long: they turn by positions, whatever is between.
    """
    rope = config.attention.rope
    reach = rope.original_max_position or config.max_position  # that without is the whole context
    steps = min(PROBE_TOKENS, config.max_position) - 1
    if rope.kind in ("default", "linear") or not steps:
        return 1
    return max(1, min(-(-min(reach, FARTHEST) // steps), (config.max_position - 1) // steps))


def long_length(config: ModelConfig) -> int:
    """Tokens of a window of which sliding windows of attention leave the first out; 0 for a model
    without them, and for one whose context ends before."""
    slides = config.sliding_window and config.sliding_window < config.max_position
    return min((config.sliding_window or 0) + PROBE_TOKENS, config.max_position) if slides else 0


def probe_shapes(config: ModelConfig) -> tuple[WindowShape, ...]:
    """Of the windows of a probe; of those from a text there may be fewer."""
    short = WindowShape(PROBE_WINDOWS, min(PROBE_TOKENS, config.max_position))
    shapes = [short]
    if (stride := rope_stride(config)) > 1:
        shapes.append(short._replace(stride=stride))
    if (length := long_length(config)) > PROBE_TOKENS:
        shapes.append(WindowShape(LONG_WINDOWS, length))
    return tuple(shapes)


def compared(shapes: Sequence[WindowShape]) -> int:
    """At how many positions of windows of these shapes logits are compared."""
    return sum(shape.windows * min(shape.length, PROBE_TOKENS) for shape in shapes)


def text_probe(base: Checkpoint, text: TokenBatch) -> Probe:
    """Windows of calibration text for comparing logits.

    Long ones take what is valid of the text as one document. Windows that it is too short for are
    of random tokens.
    """
    probe = random_probe(base)
    if not text.total:
        return probe
    length = min(PROBE_TOKENS, int(text.valid.sum(axis=1).max()))
    whole = np.flatnonzero(text.valid[:, :length].all(axis=1))
    rows = np.unique(whole[np.linspace(0, len(whole) - 1, PROBE_WINDOWS).astype(int)])
    short = text.tokens[rows, :length]
    return tuple(
        dataclasses.replace(one, tokens=_stretches(text, one.tokens) if one.is_long else short)
        for one in probe
    )


def _stretches(text: TokenBatch, instead: np.ndarray) -> np.ndarray:  # int32 [B, T] -> [B, T]
    windows, length = instead.shape
    if text.total < length:
        return instead
    tokens = text.tokens[text.valid]
    starts = np.linspace(0, len(tokens) - length, windows).astype(int)
    return tokens[starts[:, None] + np.arange(length)]


def random_probe(base: Checkpoint) -> Probe:
    """Windows of random tokens for comparing logits without a text."""
    # What stands for an image is no text, and programs compute another thing from it.
    outer = base.about.outer or {}
    others = [value for key, value in outer.items() if key.endswith("_token_id")]
    others = [one for one in others if isinstance(one, int)]
    rng, size, found = np.random.default_rng(0), base.config.vocab_size, []
    for windows, length, stride in probe_shapes(base.config):
        drawn = rng.integers(0, size, (windows, length))
        tokens = np.where(np.isin(drawn, others), 0, drawn).astype(np.int32)
        found.append(ProbeWindows(tokens, stride))
    return tuple(found)
