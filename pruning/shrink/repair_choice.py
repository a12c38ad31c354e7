"""A text that processes repair a model on, and which repair a layer gets by what it errs there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe_jax.spread import Spread
from moe_jax.stream import Batches
from pruning.scores.parts import dealt


@dataclass(frozen=True)
class RepairedLayer:
    """What became of one layer.

    Attributes:
      index: of the layer in the model.
      choice: "expert" if every expert makes up for its own channels, "layer" if for those of all,
        "none" if the layer is as it was pruned; see `chosen`.
      experts: how many keep something that repair can change.
      changed: how many of them were changed.
      starved: how many of them fewer tokens reached than they keep channels.
      errors: choice -> squared error of the residual stream behind the layer, on held-out windows.
    """

    index: int
    choice: str
    experts: int
    changed: int
    starved: int
    errors: dict[str, float]


@dataclass(frozen=True, eq=False)
class Text:
    """A text of which this process has some windows.

    Attributes:
      valid: bool [B, T], of the whole text.
      own: those windows, with others of padding.
      rows: int [b], which of the text's windows each of these is, B for padding.
      spread: the processes that have it together.
    """

    valid: np.ndarray
    own: Batches
    rows: np.ndarray
    spread: Spread

    @classmethod
    def of(cls, whole: Batches, spread: Spread) -> "Text":
        """This process's part of a text."""
        return cls(whole.valid, *dealt(whole, spread), spread)

    def each_token(self, values: np.ndarray) -> np.ndarray:
        """Numbers of all valid tokens of the text, float64 [N], from those of this process's
        windows, [b, T]."""
        whole = np.zeros((len(self.valid) + 1, self.valid.shape[1]))
        whole[self.rows] = values
        return self.spread.total({"values": whole[:-1]})["values"][self.valid]


def errors_at_tokens(
    text: Text, wanted: Sequence[np.ndarray], behind: Iterable[np.ndarray]
) -> np.ndarray:  # float64 [N]
    """Squared error of the stream behind a layer at every token, of all processes.

    Args:
      text: the tokens.
      wanted: per batch [b, T, D], what should stand there.
      behind: per batch [b, T, D], what does.
    """
    own, errors = text.own, np.zeros(text.own.valid.shape)
    for a, b, rows in zip(wanted, behind, own.rows, strict=True):
        valid = own.valid[rows]
        squares = np.square(a.astype(np.float64) - b.astype(np.float64))[valid]
        errors[rows][valid] = squares.sum(axis=1)
    return text.each_token(errors)


def lacking(
    wanted: Sequence[np.ndarray], behind: Iterable[np.ndarray]
) -> np.ndarray:  # float32 [N, D]
    """What the stream behind a layer lacks of what it should be, at the tokens of all batches; per
    batch as of `errors_at_tokens`."""
    size, done = wanted[0].shape[-1], 0
    lacks = np.empty((sum(part.size for part in wanted) // size, size), np.float32)
    for part, found in zip(wanted, behind, strict=True):
        rows = slice(done, done := done + part.size // size)
        # bfloat16 is widened before the two are subtracted.
        np.subtract(part, found, out=lacks[rows].reshape(part.shape), dtype=np.float32)
    return lacks


def chosen(errors: Mapping[str, np.ndarray]) -> str:
    """The repair that errs least on held-out tokens, if that is more than chance.

    Args:
      errors: name -> errors [N] on the same tokens; "none" are those without repair.

    Returns:
      The name of the least errors; "none" if they are not less than its own by more than the
      standard error of the difference.
    """
    best = min(errors, key=lambda name: errors[name].sum())
    less = errors["none"] - errors[best]
    return best if less.sum() > less.std() * len(less) ** 0.5 else "none"
